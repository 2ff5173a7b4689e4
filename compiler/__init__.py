"""The compiler: from a model file without training data to a verified deployment package."""
