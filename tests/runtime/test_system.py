"""Memory limits of containers, and positioned reads."""

from pathlib import Path

import pytest

from project.runtime import system
from project.runtime.system import memory_limit, read_at

GB = 2**30


def write_cgroup_files(root: Path, groups: str, limits: dict[str, str]) -> Path:
    """Write the files of control groups: those of this process, and their limits."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for path, limit in limits.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(limit + "\n")
    return root


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": str(2 * GB)}, 2 * GB),
        ("0::/job/step\n", {"job/memory.max": str(3 * GB), "job/step/memory.max": "max"}, 3 * GB),
        ("0::/job/step\n", {"job/memory.max": str(3 * GB), "job/step/memory.max": str(GB)}, GB),
        ("0::/of/the/host\n", {"memory.max": str(GB)}, GB),
        ("5:cpu:/a\n4:memory:/docker/x\n", {"memory/docker/x/memory.limit_in_bytes": str(GB)}, GB),
        ("4:cpu,memory:/of/the/host\n", {"memory/memory.limit_in_bytes": str(2 * GB)}, 2 * GB),
        ("4:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 64 * GB),
        ("0::/\n", {"memory.max": "max"}, 64 * GB),
        ("0::/\n", {}, 64 * GB),
    ],
)
def test_lowest_limit_of_the_control_groups_applies(
    groups: str, limits: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "_physical_memory", lambda: 64 * GB)
    assert memory_limit(write_cgroup_files(tmp_path, groups, limits)) == expected


def test_without_control_groups_the_machines_memory_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_physical_memory", lambda: 64 * GB)
    assert memory_limit(tmp_path) == 64 * GB
    assert 0 < memory_limit() <= 64 * GB


@pytest.mark.parametrize("has_preadv", [True, False])
def test_file_is_read_at_an_offset(has_preadv: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_preadv:
        monkeypatch.delattr("os.preadv", raising=False)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(10)))
    target = bytearray(4)
    with path.open("rb") as file:
        assert read_at(file.fileno(), memoryview(target), 3) == 4 and target == bytes([3, 4, 5, 6])
        assert read_at(file.fileno(), memoryview(target), 8) == 2
