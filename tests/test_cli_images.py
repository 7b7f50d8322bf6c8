"""The verbs of images and containers as a process, on a pool that a server has open and on one that nobody has.

Without root: what runs commands is in ``test_cli_containers``.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commandline import Command
from conftest import needs_tool
from imageworld import registry, run, umoci_image

import thinpool

pytestmark = needs_tool("umoci", "skopeo", "busybox")
IMAGE_KEYS = {"id", "references", "digest", "platform", "created", "layers", "virtual", "mapped", "shared", "exclusive", "blobs"}
LONG_STEP = "RUN a step that has more to say than " + "fits " * 20


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = umoci_image(tmp_path_factory.mktemp("images"), 2)
    run("umoci", "config", "--image", f"{made}:test", "--config.label", "a=b", "--history.created_by", LONG_STEP)
    return made


@pytest.fixture
def alone(tmp_path: Path) -> Command:
    made = Command(tmp_path)
    made("init")
    return made


@pytest.fixture(params=["alone", "server"])
def command(request: pytest.FixtureRequest, alone: Command) -> Iterator[Command]:
    if request.param == "alone":
        yield alone
        return
    with thinpool.connect(alone.pool, server=True):  # keeps the server from stopping between two verbs
        yield alone


def test_from_a_file_to_a_committed_image_and_out(command: Command, layout: Path) -> None:
    assert command("load", layout, "--tag", "app:1", "--size", "1G") == "Loaded image: app:1\n"
    assert command("container", "create", "--name", "work", "app:1") == "work\n"
    (command.directory / "motd").write_text("hello\n")
    command("container", "cp", "motd", "work:/etc/motd")
    assert command("container", "diff", "work").splitlines() == ["C /etc", "A /etc/motd"]
    assert command.json("container", "diff", "work") == [{"kind": "C", "path": "/etc"}, {"kind": "A", "path": "/etc/motd"}]
    made = command("commit", "work", "app:2", "--author", "me", "--message", "a greeting").strip()
    command("container", "reset", "work")
    assert command("container", "diff", "work") == ""
    for source in ("app:2", made.removeprefix("sha256:")[:12]):
        command("cp", f"{source}:/etc/motd", "copied")
        assert (command.directory / "copied").read_text() == "hello\n"
    for form, kind in (("docker-archive", "docker-archive"), ("oci-archive", "oci-archive"), ("oci", "oci")):
        command("save", "app:2", "-o", form, "--format", form)
        saved = json.loads(run("skopeo", "inspect", "--config", f"{kind}:{command.directory / form}"))
        assert saved["author"] == "me" and len(saved["rootfs"]["diff_ids"]) == 3


def test_listings(alone: Command, layout: Path) -> None:
    alone("load", layout, "--tag", "app:1", "--size", "1G")
    alone("tag", "app:1", "registry.example/team/app")
    (image,) = alone.json("images")
    assert set(image) == IMAGE_KEYS
    assert image["references"] == ["docker.io/library/app:1", "registry.example/team/app:latest"]
    assert (image["platform"], image["virtual"], len(image["layers"])) == ("linux/amd64", 1 << 30, 2)
    assert image["mapped"] == image["shared"] + image["exclusive"] and image["blobs"] > 0
    digits = image["id"].removeprefix("sha256:")
    lines = [line.split() for line in alone("images").splitlines()]
    assert lines[0] == ["REFERENCE", "ID", "CREATED", "VIRTUAL", "SHARED", "EXCLUSIVE"]
    assert [(line[0], line[1], line[4]) for line in lines[1:]] == [("app:1", digits[:12], "1G"), ("registry.example/team/app:latest", digits[:12], "1G")]
    assert image["id"] in alone("images", "--no-trunc")
    alone("untag", "app:1")
    alone("untag", "registry.example/team/app")
    assert "<none>" in alone("images")


def test_history_begins_with_the_last_step(alone: Command, layout: Path) -> None:
    alone("load", layout, "--tag", "app:1")
    steps = alone.json("history", "app:1")
    assert {tuple(step) for step in steps} == {("created", "created_by", "comment", "layer", "diff_id", "size", "shared", "exclusive")}
    assert [step["layer"] is None for step in steps] == [True, True, False, False]  # umoci config came last
    assert [step["size"] > 0 for step in steps] == [False, False, True, True]
    assert steps[-1]["layer"] == alone.json("images")[0]["layers"][0]
    lines = alone("history", "app:1").splitlines()
    assert lines[0].split() == ["CREATED", "CREATED", "BY", "SIZE", "SHARED", "EXCLUSIVE", "COMMENT"]
    assert re.search(r"  RUN a step that has more to say than fits fi… +0 +0 +0\b", lines[1])
    assert LONG_STEP.strip() in alone("history", "--no-trunc", "app:1").splitlines()[1]


def test_inspect_knows_containers_and_images(command: Command, layout: Path) -> None:
    command("load", layout, "--tag", "app:1")
    command("container", "create", "--name", "box", "--label", "why=test", "app:1", "echo", "-n", "--", "hi")
    box, image = json.loads(command("inspect", "box", "app:1"))
    assert (box["Name"], box["Image"], box["Running"], box["Command"]) == ("box", "app:1", False, ["echo", "-n", "--", "hi"])
    assert box["ImageId"] == image["Id"] and image["RepoTags"] == ["app:1"]
    assert image["Config"]["Cmd"] == ["sh"] and len(image["RootFS"]["Layers"]) == 2
    assert json.loads(command("container", "inspect", "box")) == [box]
    code, line = command.fails("container", "inspect", "app:1")
    assert code == 3 and "app:1" in line


def test_containers_are_listed_and_removed(command: Command, layout: Path) -> None:
    command("load", layout, "--tag", "app:1", "--size", "1G")
    command("container", "create", "--name", "one", "app:1")
    name = command("container", "create", "app:1", "--", "--version").strip()
    listed = {container["name"]: container for container in command.json("container", "ls")}
    assert set(listed) == {"one", name}
    assert set(listed["one"]) == {
        "name", "image", "image_id", "layer", "created", "command", "running", "virtual", "mapped", "exclusive", "shared"
    }  # fmt: skip
    assert listed[name]["command"] == ["--version"] and listed["one"]["command"] == ["sh"]
    assert listed["one"]["virtual"] == 1 << 30
    header, *lines = command("container", "ls").splitlines()
    assert header.split() == ["NAME", "IMAGE", "COMMAND", "CREATED", "STATUS", "VIRTUAL", "EXCLUSIVE", "SHARED"]
    assert [line.split()[0] for line in lines] == ["one", name]
    refused = command.start("rmi", "app:1")
    assert refused.returncode == 4 and "one" in refused.stderr and name in refused.stderr
    command("container", "rm", "one", name)
    assert command.json("container", "ls") == []


def test_removed_images_give_everything_back(command: Command, layout: Path) -> None:
    command("load", layout, "--tag", "app:1")
    command("rmi", "app:1")
    empty = command.json("df")["allocated"]  # the empty file system that new images begin with stays
    command("load", layout, "--tag", "app:1")
    command("tag", "app:1", "app:2")
    (image,) = command.json("images")
    assert command("rmi", "app:2") == "Untagged: app:2\n"
    command("untag", "app:1")
    gone = command("gc").splitlines()
    assert f"Deleted: {image['id']}" in gone and re.fullmatch(r"Total reclaimed space: [\d.]+[KM]", gone[-1])
    assert {f"Deleted: {layer}" for layer in image["layers"]} <= set(gone)
    assert (command.json("images"), command.json("ls"), command.json("df")["allocated"]) == ([], [], empty)


def test_ls_shows_image_layers_by_short_names(alone: Command, layout: Path) -> None:
    alone("load", layout, "--tag", "app:1")
    names = alone.json("images")[0]["layers"]
    assert [layer["name"] for layer in alone.json("ls")] == names
    shown = alone("ls")
    assert all(name.removeprefix("sha256:")[:12] in shown and name not in shown for name in names)
    assert all(name in alone("ls", "--no-trunc") for name in names)
    everything = [layer["name"] for layer in alone.json("ls", "--all")]
    assert sum(name.startswith("blob/sha256:") for name in everything) == 2 and any("blank" in name for name in everything)


def test_files_of_any_layer_are_read(alone: Command, layout: Path) -> None:
    tree = alone.directory / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_text("in a plain layer")
    with tarfile.open(alone.directory / "tree.tar", "w") as archive:
        archive.add(tree, ".")
    alone("import", "tree.tar", "--name", "plain:1", "--size", "64M")
    alone("cp", "plain:1:/sub", "out")
    assert (alone.directory / "out/file").read_text() == "in a plain layer"


def test_a_registry_and_docker_config(command: Command, layout: Path) -> None:
    command("load", layout, "--tag", "app:1")
    config = command.directory / "docker"
    config.mkdir()
    command.environment["DOCKER_CONFIG"] = str(config)
    with registry(command.directory) as address:
        (config / "config.json").write_text(json.dumps({"auths": {}}))
        command("tag", "app:1", f"{address}/app:1")
        digest = command("push", f"{address}/app:1").strip()
        assert run("skopeo", "inspect", "--tls-verify=false", "--format", "{{.Digest}}", f"docker://{address}/app:1").strip() == digest
        (image,) = command.json("images")
        command("rmi", "app:1", f"{address}/app:1")
        assert command("pull", f"{address}/app:1").strip() == image["id"]
        (config / "config.json").write_text("{")
        code, line = command.fails("pull", f"{address}/app:1")
    assert code == 1 and str(config) in line


def test_exit_codes(alone: Command, layout: Path) -> None:
    alone("load", layout, "--tag", "app:1")
    alone("container", "create", "--name", "box", "app:1")
    (alone.directory / "noise").write_bytes(b"no image " * 1000)
    (alone.directory / "there").write_text("")
    cases: list[tuple[int, str, str]] = [
        (3, "load nowhere.tar", "nowhere.tar"),
        (1, "load noise", "noise"),
        (2, "pull a/UPPER", "UPPER"),
        (1, "pull 127.0.0.1:1/app", "127.0.0.1:1"),
        (4, "save app:1 -o there", "there"),
        (2, "save app:1 -o out.tar --format zip", "zip"),
        (2, "save app:1", "--output"),
        (3, "inspect box nope", "nope"),
        (4, "rmi app:1", "box"),
        (4, "container create --name box app:1", "box"),
        (3, "container rm nope", "nope"),
        (2, "container resize box 1M", "1M"),
        (2, "container cp here there", "NAME:/PATH"),
        (1, "cp box:/nope out", "/nope"),
        (3, "cp missing box:/etc", "missing"),
        (2, "container frobnicate", "frobnicate"),
    ]
    with thinpool.connect(alone.pool, server=True), ThreadPoolExecutor(4) as threads:
        answers = threads.map(lambda case: alone.fails(*case[1].split()), cases)
        found = {words: answer for (_, words, _), answer in zip(cases, answers, strict=True)}
    assert {words: code for words, (code, _) in found.items()} == {words: code for code, words, _ in cases}
    assert [words for _, words, said in cases if said not in found[words][1]] == []
    assert [image["references"] for image in alone.json("images")] == [["docker.io/library/app:1"]]
    assert [container["name"] for container in alone.json("container", "ls")] == ["box"]
