"""Checkpoints on disk, and a kill after some of them: what resumed work is tested with."""


class Store:
    """Keeps finished parts in `folder`; `fail_after` of them were made, the next is a kill."""

    def __init__(self, folder, fail_after=None):
        self.folder, self.fail_after, self.made, self.parts = folder, fail_after, 0, {}

    def __call__(self, part, make, save, load):
        key = repr(sorted(part.items()))
        if key not in self.parts:
            if self.made == self.fail_after:
                raise KeyboardInterrupt
            folder = self.folder / str(len(self.parts))
            folder.mkdir()
            save(make(), folder)
            self.parts[key] = folder
            self.made += 1
        return load(self.parts[key])
