"""The fields of Triton's `model_config.proto` that dfqc writes: a configuration in, a message out.

Names, numbers and types are those of the `ModelConfig` that the `tritonclient` package ships
(2.73), against which they were compared; the package itself pins versions that exclude ours. A
field that is not here is refused by the parser, as is a value of another type.
"""

from __future__ import annotations

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

_FIELD = descriptor_pb2.FieldDescriptorProto
_KINDS = {
    "string": _FIELD.TYPE_STRING,
    "int32": _FIELD.TYPE_INT32,
    "uint32": _FIELD.TYPE_UINT32,
    "int64": _FIELD.TYPE_INT64,
    "uint64": _FIELD.TYPE_UINT64,
    "bool": _FIELD.TYPE_BOOL,
}
# message -> fields as "name number type", `*` for repeated, a capital letter for another message.
MESSAGES = {
    "ModelConfig": (
        *("name 1 string", "platform 2 string", "max_batch_size 4 int32", "input 5 *ModelInput"),
        *("output 6 *ModelOutput", "instance_group 7 *ModelInstanceGroup"),
        *("dynamic_batching 11 ModelDynamicBatching", "model_warmup 16 *ModelWarmup"),
        *("backend 17 string", "default_model_filename 8 string"),
    ),
    "ModelInput": ("name 1 string", "data_type 2 DataType", "dims 4 *int64"),
    "ModelOutput": ("name 1 string", "data_type 2 DataType", "dims 3 *int64"),
    "ModelInstanceGroup": ("name 1 string", "kind 4 Kind", "count 2 int32"),
    "ModelDynamicBatching": (
        "preferred_batch_size 1 *int32",
        "max_queue_delay_microseconds 2 uint64",
    ),
    "ModelWarmup": ("name 1 string", "batch_size 2 uint32", "inputs 3 *Entry", "count 4 uint32"),
    "Entry": ("key 1 string", "value 2 WarmupInput"),  # a map is a repeated pair on the wire
    "WarmupInput": (
        *("data_type 1 DataType", "dims 2 *int64", "zero_data 3 bool", "random_data 4 bool"),
    ),
}
ENUMS = {
    "DataType": {
        "TYPE_INVALID": 0,
        "TYPE_BOOL": 1,
        "TYPE_UINT8": 2,
        "TYPE_INT8": 6,
        "TYPE_INT32": 8,
        "TYPE_INT64": 9,
        "TYPE_FP16": 10,
        "TYPE_FP32": 11,
    },
    "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2},
}


def parse_config(text: str):
    """Return the message; raises `text_format.ParseError` for what the schema does not have."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("dfqc_test.ModelConfig"))
    return text_format.Parse(text, kind())


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="triton_subset.proto", package="dfqc_test", syntax="proto3"
    )
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for line in fields:
            field, number, kind = line.split()
            repeated, kind = kind.startswith("*"), kind.lstrip("*")
            added = message.field.add(name=field, number=int(number))
            added.label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
            if kind in _KINDS:
                added.type = _KINDS[kind]
            else:
                added.type = _FIELD.TYPE_ENUM if kind in ENUMS else _FIELD.TYPE_MESSAGE
                added.type_name = f".dfqc_test.{kind}"
    return file
