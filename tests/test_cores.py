"""How many processors a container leaves us, in the files by which Linux tells it."""

import pytest
from miniature import put

from autoresearch.common import cores, cpu_quotas

V1 = "4:memory:/docker/abc\n3:cpu,cpuacct:{}\n0::/\n"


@pytest.mark.parametrize(
    "groups, files, quotas",
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, [4]),
        ("0::/not/mounted/here\n", {"cpu.max": "200000 100000\n"}, [2]),
        (V1.format("/a"), {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "9"}, []),
        (
            V1.format("/far"),
            {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"},
            [0.5],
        ),
        ("nonsense", {}, []),
    ],
)
def test_quotas_of_control_groups(tmp_path, groups, files, quotas):
    put(tmp_path / "proc/self/cgroup", groups)
    for name, content in files.items():
        put(tmp_path / "sys/fs/cgroup" / name, content)
    assert cpu_quotas(tmp_path) == quotas


@pytest.mark.parametrize("quotas, count", [([], 8), ([16.0], 8), ([4.0, 1.5], 2), ([0.2], 1)])
def test_the_smallest_quota_counts(monkeypatch, quotas, count):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr("autoresearch.common.cpu_quotas", lambda: quotas)
    assert cores() == count
