"""containerd's snapshotter, asked as containerd asks: codes, keys and labels, sizes, usage, what is left over."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from commandline import wait_until
from conftest import missing, needs_tool
from imageworld import umoci_image
from nbdworld import EXPORT_NAME, option, take
from outofsight import written_out_of_sight
from snapshotclient import Client

import thinpool
from thinpool.containerd.records import layer_name
from thinpool.containerd.service import Service

lacking = missing("mkfs.ext4", "debugfs", root=True)
pytestmark = pytest.mark.skipif(lacking is not None, reason=lacking or "")

MIB, GIB = 1 << 20, 1 << 30
SIZE, REF = "containerd.io/snapshot/max-size", "containerd.io/snapshot.ref"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module")
def pool(place: Path) -> Iterator[thinpool.Pool]:
    """One for all, for making its first file system takes a while."""
    with thinpool.Pool.create(place / "pool") as pool:
        yield pool


@pytest.fixture(scope="module")
def address(place: Path, pool: thinpool.Pool) -> Iterator[Path]:
    """Where the snapshotter listens."""
    service = Service(lambda: nullcontext(pool), str(place / "sock"), size=GIB)
    yield place / "sock"
    service.close()


@pytest.fixture
def client(address: Path, pool: thinpool.Pool) -> Iterator[Client]:
    """What a test made is removed, and nothing may be left of it."""
    with Client(address) as client:
        yield client
        client.remove_all()
        wait_until(lambda: not pool.attachments() and not layers_of_snapshots(pool))


def layers_of_snapshots(pool: thinpool.Pool) -> list[str]:
    return [layer.name for layer in pool.layers() if layer.name.startswith(("containerd/", "containerd-removed/"))]


def write(device: str, data: bytes, offset: int) -> None:
    with open(device, "r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# --- what is asked wrongly ---


@pytest.mark.parametrize(
    ("code", "call", "fields"),
    [
        ("ALREADY_EXISTS", "Prepare", {"key": "active"}),
        ("ALREADY_EXISTS", "View", {"key": "view", "parent": "committed"}),
        ("ALREADY_EXISTS", "Prepare", {"key": "committed"}),
        ("ALREADY_EXISTS", "Commit", {"key": "active", "name": "committed"}),
        ("NOT_FOUND", "Prepare", {"key": "new", "parent": "nothing"}),
        ("NOT_FOUND", "Commit", {"key": "nothing", "name": "new"}),
        ("NOT_FOUND", "Mounts", {"key": "nothing"}),
        ("NOT_FOUND", "Stat", {"key": "nothing"}),
        ("NOT_FOUND", "Usage", {"key": "nothing"}),
        ("NOT_FOUND", "Remove", {"key": "nothing"}),
        ("NOT_FOUND", "Update", {"info": {"name": "nothing"}}),
        ("INVALID_ARGUMENT", "Prepare", {"key": "new", "parent": "active"}),
        ("INVALID_ARGUMENT", "Prepare", {"key": ""}),
        ("INVALID_ARGUMENT", "Commit", {"key": "active", "name": ""}),
        ("INVALID_ARGUMENT", "Prepare", {"key": "new", "labels": {SIZE: "much"}}),
        ("INVALID_ARGUMENT", "Update", {"info": {"name": "active"}, "update_mask": {"paths": ["parent"]}}),
        ("FAILED_PRECONDITION", "Mounts", {"key": "committed"}),
        ("FAILED_PRECONDITION", "Commit", {"key": "view", "name": "new"}),
        ("FAILED_PRECONDITION", "Remove", {"key": "committed"}),
    ],
)
def test_errors_have_the_codes_that_containerd_knows(three: Client, code: str, call: str, fields: dict[str, object]) -> None:
    assert three.fails(call, **fields)[0] == code
    assert three.names() == {"active", "committed", "view"}


@pytest.fixture
def three(client: Client) -> Client:
    """With one snapshot of each kind."""
    client("Prepare", key="first")
    client("Commit", key="first", name="committed")
    client("Prepare", key="active", parent="committed")
    client("View", key="view", parent="committed")
    return client


def test_a_bad_filter_is_refused(client: Client) -> None:
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        client.list("name==")


# --- keys, labels, records ---


@pytest.mark.parametrize("key", ["default/12/extract-1-x sha256:0f", "a+20b", "ключ", "x" * 400, "../up", "-", "line\nbreak"])
def test_keys_are_kept_as_given(client: Client, pool: thinpool.Pool, key: str) -> None:
    client("Prepare", key=key)
    client("Prepare", key=f"{key} ")  # another one
    assert client("Stat", key=key).info.name == key
    assert client.names() == {key, f"{key} "}
    client("Remove", key=key)
    assert client.names() == {f"{key} "}


def test_labels_are_kept_as_given(client: Client) -> None:
    labels = {"thinpool.partial": "1", "thinpool.snapshot": "x", "": "nameless", "ключ": "з" * 2000, "empty": ""}
    client("Prepare", key="a", labels=labels)
    assert dict(client("Stat", key="a").info.labels) == labels
    assert client.names('labels."thinpool.partial"==1') == {"a"}


def test_labels_are_changed_by_a_mask_or_all(client: Client) -> None:
    client("Prepare", key="a", labels={"x": "1", "y": "1", "z.z": "1"})
    created = client("Stat", key="a").info.created_at
    changed = client("Update", info={"name": "a", "labels": {"x": "2", "new": "2"}}, update_mask={"paths": ["labels.x", "labels.z.z"]}).info
    assert dict(changed.labels) == {"x": "2", "y": "1"}
    assert changed.created_at == created != changed.updated_at
    assert dict(client("Update", info={"name": "a", "labels": {"q": "3"}}).info.labels) == {"q": "3"}
    assert dict(client("Stat", key="a").info.labels) == {"q": "3"}


def test_snapshots_are_in_the_commits_of_their_layers(pool_path: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with thinpool.Pool.create(pool_path) if not pool_path.exists() else thinpool.Pool.open(pool_path) as pool:
            service = Service(lambda pool=pool: nullcontext(pool), str(tmp_path / "sock"), size=GIB)
            with Client(tmp_path / "sock") as client:
                if not client.list():
                    client.commit("base", tmp_path / "mnt", file=b"content")
                    client("Prepare", key="top", parent="base", labels={"a": "b"})
                else:
                    with client.mounted(tmp_path / "mnt", key="top") as root:
                        assert (root / "file").read_bytes() == b"content"
                        assert [entry.name for entry in root.iterdir()] == ["file"]  # no lost+found
                kinds = {info.name: (info.kind, info.parent, dict(info.labels)) for info in client.list()}
                assert kinds == {"base": (3, "", {}), "top": (2, "base", {"a": "b"})}
            service.close()


def test_a_commit_that_was_cut_short_is_ended(pool_path: Path, tmp_path: Path) -> None:
    thinpool.Pool.create(pool_path).close()

    def served() -> Service:
        return Service(lambda: thinpool.Pool.open(pool_path), str(tmp_path / "sock"), size=GIB)

    service = served()
    with Client(tmp_path / "sock") as client:
        client("Prepare", key="active")
    service.close()
    with thinpool.Pool.open(pool_path) as pool:
        pool.layer(layer_name("active")).seal()
    service = served()
    with Client(tmp_path / "sock") as client:
        assert client.names("kind==active") == {"active"}
        client("Commit", key="active", name="name")
        assert client.names("kind==committed") == client.names() == {"name"}
        client("Prepare", key="active", parent="name")
    service.close()


# --- what they take ---


def test_usage_is_what_differs_from_the_parent_to_the_byte(client: Client) -> None:
    device = client.device("Prepare", key="a")
    assert client("Usage", key="a").size == 0
    write(device, b"x" * 128 * 1024, 512 * MIB)
    assert client("Usage", key="a").size == 128 * 1024
    client("Commit", key="a", name="below")
    device = client.device("Prepare", key="b", parent="below")
    write(device, b"y" * 4096, 512 * MIB + 8192)
    write(device, b"z" * 4096, 512 * MIB + 8192)
    write(device, b"z" * 8192, 512 * MIB + 65536)
    assert client("Usage", key="b").size == 3 * 4096
    client("Commit", key="b", name="above")
    client("View", key="view", parent="above")
    assert [client("Usage", key=key).size for key in ("below", "above", "view")] == [128 * 1024, 3 * 4096, 0]


def test_usage_counts_the_inodes_of_what_was_unmounted(client: Client, tmp_path: Path) -> None:
    client.commit("below", tmp_path / "mnt", one=b"", two=b"2")
    client.commit("above", tmp_path / "mnt", "below", three=b"")
    assert [client("Usage", key=key).inodes for key in ("below", "above")] == [2, 1]


def test_usage_of_what_was_committed_while_it_was_mounted(client: Client, tmp_path: Path) -> None:
    with client.mounted(tmp_path / "mnt", "Prepare", key="a") as root:
        (root / "file").write_bytes(os.urandom(MIB))
        client("Commit", key="a", name="committed")
        mounted = client("Usage", key="committed")
    client("Cleanup")
    for usage in (mounted, client("Usage", key="committed")):
        assert (MIB <= usage.size < 2 * MIB, usage.inodes) == (True, 1)


def size_of(root: Path) -> int:
    status = os.statvfs(root)
    return status.f_blocks * status.f_frsize


@needs_tool("resize2fs")
@pytest.mark.parametrize("parent", ["", "base"])
@pytest.mark.parametrize("size", ["3G", "512M"])
def test_a_label_sets_the_size(client: Client, pool: thinpool.Pool, tmp_path: Path, parent: str, size: str) -> None:
    client.commit("base", tmp_path / "mnt", file=b"content")
    with client.mounted(tmp_path / "mnt", "Prepare", key="a", parent=parent, labels={SIZE: size}) as root:
        wanted = pool.layer(layer_name("a")).size
        assert wanted == {"3G": 3 * GIB, "512M": 512 * MIB}[size]
        assert 0.9 * wanted < size_of(root) <= wanted
        assert [entry.name for entry in root.iterdir() if entry.name != "lost+found"] == (["file"] if parent else [])


@needs_tool("resize2fs")
def test_a_size_that_cannot_be_leaves_nothing(client: Client, pool: thinpool.Pool, tmp_path: Path) -> None:
    client.commit("base", tmp_path / "mnt", file=os.urandom(40 * MIB))
    code, message = client.fails("Prepare", key="a", parent="base", labels={SIZE: "16M"})
    assert code == "INVALID_ARGUMENT" and "shrink" in message
    assert client.names() == {"base"}
    assert pool.attachments() == []


@needs_tool("mkfs.xfs", "xfs_growfs")
def test_xfs_is_mounted_many_times_and_grows(pool: thinpool.Pool, tmp_path: Path) -> None:
    service = Service(lambda: nullcontext(pool), str(tmp_path / "sock"), filesystem="xfs", size=GIB)
    with Client(tmp_path / "sock") as client:
        client.commit("base", tmp_path / "one", file=b"content")
        assert client("Usage", key="base").inodes == 1
        with client.mounted(tmp_path / "one", "Prepare", key="a", parent="base", labels={SIZE: "2G"}) as one:
            with client.mounted(tmp_path / "two", "View", key="b", parent="base") as two:
                assert size_of(one) > 1.8 * GIB > size_of(two)
                assert (one / "file").read_bytes() == (two / "file").read_bytes() == b"content"
                with pytest.raises(OSError):
                    (two / "file").write_bytes(b"no")
        assert client.fails("Prepare", key="c", parent="base", labels={SIZE: "512M"})[0] == "INVALID_ARGUMENT"
        client.remove_all()
    service.close()


# --- layers that the pool has ---


@needs_tool("umoci")
def test_a_layer_that_the_pool_has_need_not_be_unpacked(client: Client, pool: thinpool.Pool, tmp_path: Path) -> None:
    chain_ids = pool.images.load(umoci_image(tmp_path, 2), "test", size="1G").layers
    parent = ""
    for chain_id in chain_ids:
        for attempt in ("once", "again"):
            code, _ = client.fails("Prepare", key=f"extract-{attempt}", parent=parent, labels={REF: chain_id})
            assert code == "ALREADY_EXISTS"
        (found,) = client.list(f'labels."{REF}"=={chain_id},parent=="{parent}"')
        assert found.kind == 3
        parent = found.name
    assert len(client.list()) == len(chain_ids)
    pool.images.remove("test")
    with client.mounted(tmp_path / "mnt", "Prepare", key="container", parent=parent) as root:
        assert (root / "data/f1-0").exists()


def test_a_committed_snapshot_that_holds_a_layer_is_found_again(client: Client, tmp_path: Path) -> None:
    chain_id = "sha256:" + "0" * 64
    client("Prepare", key="extract", labels={REF: chain_id})
    client("Commit", key="extract", name="namespace/1/layer", labels={REF: chain_id})
    assert client.fails("Prepare", key="other", labels={REF: chain_id})[0] == "ALREADY_EXISTS"
    client.commit("base", tmp_path / "mnt")
    client("Prepare", key="other", parent="base", labels={REF: chain_id})  # on another parent it is another snapshot
    client("Update", info={"name": "namespace/1/layer"})
    client("Prepare", key="third", labels={REF: chain_id})


# --- devices, and what is left over ---


def test_a_snapshot_that_is_mounted_can_be_committed(client: Client, pool: thinpool.Pool, tmp_path: Path) -> None:
    with client.mounted(tmp_path / "mnt", "Prepare", key="a") as root:
        (root / "file").write_bytes(b"not synced")
        client("Commit", key="a", name="committed")
        assert client.names() == {"committed"}
        (root / "file").write_bytes(b"later")
        with client.mounted(tmp_path / "view", "View", key="view", parent="committed") as view:
            assert (view / "file").read_bytes() == b"not synced"
    wait_until(lambda: [one.layer for one in pool.attachments()] == [layer_name("view")])


def test_a_file_system_that_a_killed_one_left_frozen_is_thawed(client: Client, pool: thinpool.Pool, tmp_path: Path) -> None:
    with client.mounted(tmp_path / "mnt", "Prepare", key="a") as root:
        (pool.path / "run" / f"frozen-{pool.layer(layer_name('a')).id}").touch()
        subprocess.run(["fsfreeze", "--freeze", root], check=True)
        try:
            again = Service(lambda: nullcontext(pool), str(tmp_path / "other"), size=GIB)
            thawed = subprocess.run(["timeout", "20", "touch", root / "file"], check=False).returncode == 0
            again.close()
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", root], check=False, capture_output=True)
        assert thawed


def test_a_snapshot_that_is_mounted_out_of_sight_can_be_committed(client: Client, pool: thinpool.Pool, tmp_path: Path) -> None:
    with written_out_of_sight(client.device("Prepare", key="a"), tmp_path):
        client("Commit", key="a", name="committed")
        with client.mounted(tmp_path / "view", "View", key="view", parent="committed") as view:
            assert (view / "file").read_text() == "not synced"
    wait_until(lambda: [one.layer for one in pool.attachments()] == [layer_name("view")])


def test_a_snapshot_that_is_mounted_can_be_read_meanwhile(client: Client, pool: thinpool.Pool, tmp_path: Path) -> None:
    with client.mounted(tmp_path / "mnt", "Prepare", key="a") as root:
        (root / "file").write_bytes(b"first")
        with client.mounted(tmp_path / "reader", "Mounts", key="a", add="ro") as reader:
            assert (reader / "file").read_bytes() == b"first"
            assert subprocess.run(["touch", reader / "file"], capture_output=True, check=False).returncode != 0
            (root / "file").write_bytes(b"second")
            assert (reader / "file").read_bytes() == b"second"
    with client.mounted(tmp_path / "reader", "Mounts", key="a", add="ro") as reader:  # which the device can be now
        assert (reader / "file").read_bytes() == b"second"
    with client.mounted(tmp_path / "mnt", "Mounts", key="a") as root:
        client("Mounts", key="a")
    assert len(list((pool.path / "run" / "shared").iterdir())) == 1
    client("Cleanup")
    assert list((pool.path / "run" / "shared").iterdir()) == []


def test_a_snapshot_that_is_mounted_can_be_removed(client: Client, pool: thinpool.Pool, tmp_path: Path) -> None:
    with client.mounted(tmp_path / "mnt", "Prepare", key="a") as root:
        client("Remove", key="a")
        assert client.names() == set()
        client("Prepare", key="a")
        client("Remove", key="a")
        client("Cleanup")
        (root / "file").write_bytes(b"works on")
    wait_until(lambda: not pool.attachments() and not layers_of_snapshots(pool))


def test_what_is_read_over_nbd_goes_when_it_is_read_no_more(client: Client, pool: thinpool.Pool, tmp_path: Path) -> None:
    client("Prepare", key="a")
    client("Commit", key="a", name="committed")
    pool.serve_nbd(f"unix:{tmp_path}/nbd")
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(str(tmp_path / "nbd"))
        assert take(reader, 18)[:8] == b"NBDMAGIC"
        reader.sendall(struct.pack(">I", 3) + option(EXPORT_NAME, layer_name("committed").encode()))
        assert len(take(reader, 10)) == 10
        client("Remove", key="committed")
        assert client.names() == set()
    wait_until(lambda: not layers_of_snapshots(pool))


def test_what_was_removed_gives_all_back(client: Client, pool: thinpool.Pool, tmp_path: Path) -> None:
    pool.reclaim()
    before = pool.usage().allocated
    client.commit("below", tmp_path / "mnt", file=os.urandom(4 * MIB))
    client.commit("above", tmp_path / "mnt", "below", file=os.urandom(4 * MIB))
    client("View", key="view", parent="above")
    assert pool.usage().allocated > before + 8 * MIB
    for key in ("view", "above", "below"):
        client("Remove", key=key)
    pool.reclaim()
    assert pool.usage().allocated == before
    assert pool.attachments() == []
    assert layers_of_snapshots(pool) == []


def test_devices_that_went_down_come_back(client: Client, pool: thinpool.Pool, tmp_path: Path) -> None:
    with client.mounted(tmp_path / "mnt", "Prepare", key="a") as root:
        (root / "file").write_bytes(b"content")
    pool.layer(layer_name("a")).detach()
    device = client.device("Mounts", key="a")
    assert [one.device for one in pool.attachments()] == [device]
    with client.mounted(tmp_path / "mnt", key="a") as root:
        assert (root / "file").read_bytes() == b"content"


def test_only_its_owner_may_ask(address: Path) -> None:
    assert address.stat().st_mode & 0o777 == 0o600


def test_a_place_where_nobody_can_listen_is_told(pool: thinpool.Pool, tmp_path: Path) -> None:
    with pytest.raises(thinpool.BadAddress, match="cannot listen"):
        Service(lambda: nullcontext(pool), str(tmp_path / ("x" * 120)), size=GIB)


def test_mounts_of_views_are_read_only(client: Client, tmp_path: Path) -> None:
    client.commit("base", tmp_path / "mnt", file=b"content")
    with client.mounted(tmp_path / "mnt", "View", key="view", parent="base") as root:
        assert subprocess.run(["touch", root / "file"], capture_output=True, check=False).returncode != 0
