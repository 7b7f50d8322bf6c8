"""The messages of ``containerd.services.snapshots.v1``, described here, so that nothing is generated.

A field is ``"name": (number, type)``; ``[type]`` is repeated, ``map`` is text to text. Numbers and names are containerd's
(api/services/snapshots/v1/snapshots.proto, api/types/mount.proto).
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, empty_pb2, field_mask_pb2, message_factory, timestamp_pb2

SERVICE = "containerd.services.snapshots.v1.Snapshots"
VIEW, ACTIVE, COMMITTED = 1, 2, 3

_PACKAGE, _TYPES = "containerd.services.snapshots.v1", "containerd.types"
_TIME, _MASK = ".google.protobuf.Timestamp", ".google.protobuf.FieldMask"
_MOUNT, _INFO, _KIND = f".{_TYPES}.Mount", f".{_PACKAGE}.Info", f".{_PACKAGE}.Kind"
_KINDS = {"UNKNOWN": 0, "VIEW": VIEW, "ACTIVE": ACTIVE, "COMMITTED": COMMITTED}
_MAP: Final = "map"
_GOOGLE = (empty_pb2, field_mask_pb2, timestamp_pb2)

Fields = dict[str, tuple[int, str | list[str]]]
_PREPARE: Fields = {"snapshotter": (1, "string"), "key": (2, "string"), "parent": (3, "string"), "labels": (4, _MAP)}
_KEY: Fields = {"snapshotter": (1, "string"), "key": (2, "string")}
_MESSAGES: dict[str, Fields] = {
    "Info": {
        "name": (1, "string"),
        "parent": (2, "string"),
        "kind": (3, _KIND),
        "created_at": (4, _TIME),
        "updated_at": (5, _TIME),
        "labels": (6, _MAP),
    },
    "PrepareSnapshotRequest": _PREPARE,
    "PrepareSnapshotResponse": {"mounts": (1, [_MOUNT])},
    "ViewSnapshotRequest": _PREPARE,
    "ViewSnapshotResponse": {"mounts": (1, [_MOUNT])},
    "MountsRequest": _KEY,
    "MountsResponse": {"mounts": (1, [_MOUNT])},
    "RemoveSnapshotRequest": _KEY,
    "CommitSnapshotRequest": {"snapshotter": (1, "string"), "name": (2, "string"), "key": (3, "string"), "labels": (4, _MAP)},
    "StatSnapshotRequest": _KEY,
    "StatSnapshotResponse": {"info": (1, _INFO)},
    "UpdateSnapshotRequest": {"snapshotter": (1, "string"), "info": (2, _INFO), "update_mask": (3, _MASK)},
    "UpdateSnapshotResponse": {"info": (1, _INFO)},
    "ListSnapshotsRequest": {"snapshotter": (1, "string"), "filters": (2, ["string"])},
    "ListSnapshotsResponse": {"info": (1, [_INFO])},
    "UsageRequest": _KEY,
    "UsageResponse": {"size": (1, "int64"), "inodes": (2, "int64")},
    "CleanupRequest": {"snapshotter": (1, "string")},
}
_MOUNT_FIELDS: Fields = {"type": (1, "string"), "source": (2, "string"), "target": (3, "string"), "options": (4, ["string"])}


def _add_message(file: Any, name: str, fields: Fields) -> None:
    field_type = descriptor_pb2.FieldDescriptorProto
    message = file.message_type.add(name=name)
    for field_name, (number, kind) in fields.items():
        field = message.field.add(name=field_name, number=number)
        repeated = isinstance(kind, list) or kind == _MAP
        field.label = field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL
        one = kind[0] if isinstance(kind, list) else kind
        if one == _MAP:  # on the wire: repeated messages of key and value, named as protoc names them
            entry = message.nested_type.add(name=f"{field_name.title()}Entry")
            entry.options.map_entry = True
            for position, part in enumerate(("key", "value"), start=1):
                entry.field.add(name=part, number=position, label=field_type.LABEL_OPTIONAL, type=field_type.TYPE_STRING)
            field.type, field.type_name = field_type.TYPE_MESSAGE, f".{file.package}.{name}.{entry.name}"
        elif one.startswith("."):
            field.type, field.type_name = field_type.TYPE_ENUM if one == _KIND else field_type.TYPE_MESSAGE, one
        else:
            field.type = {"string": field_type.TYPE_STRING, "int64": field_type.TYPE_INT64}[one]


def _describe() -> dict[str, Any]:
    """The classes of all messages, by name."""
    types = descriptor_pb2.FileDescriptorProto(name="thinpool/mount.proto", package=_TYPES, syntax="proto3")
    _add_message(types, "Mount", _MOUNT_FIELDS)
    needed = [module.DESCRIPTOR.name for module in _GOOGLE]
    service = descriptor_pb2.FileDescriptorProto(name="thinpool/snapshots.proto", package=_PACKAGE, syntax="proto3", dependency=[types.name, *needed])
    kind = service.enum_type.add(name="Kind")
    for name, number in _KINDS.items():
        kind.value.add(name=name, number=number)
    for name, fields in _MESSAGES.items():
        _add_message(service, name, fields)
    pool = descriptor_pool.DescriptorPool()  # our own: containerd's generated ones may be loaded in the same process
    for module in _GOOGLE:
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    for file in (types, service):
        pool.AddSerializedFile(file.SerializeToString())
    names = {name: f"{_PACKAGE}.{name}" for name in _MESSAGES} | {"Mount": f"{_TYPES}.Mount", "Empty": "google.protobuf.Empty"}
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(full)) for name, full in names.items()}


classes = _describe()
"""The class of each message, by its name without the package."""
