"""`transformers` and this project's folder `kernels/`, without and with the distribution of that name."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version
from transformers.utils import import_utils

import kernels
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError

# `import transformers` alone is lazy; a model class pulls in what looks for `kernels`.
USE = """
from transformers import LlamaConfig, LlamaForCausalLM
import kernels.hadamard
LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                             num_attention_heads=1, num_key_value_heads=1))
print("works", kernels.__file__)
"""
GUARD = """
import sys
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError
try:
    refuse_foreign_kernels()
except UserError as error:
    sys.exit(str(error))
"""
ACCEPTED = import_utils.KERNELS_MIN_VERSION  # by the transformers that is installed here
VERSIONS = [ACCEPTED, "0.1.0", "0.16.0", "0.18.3", "99.0"]


def run(code: str, folder: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in `folder`, so that `folder` is the first place where it looks for packages."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def install(site: Path, name: str, version: str, packages: tuple[str, ...]) -> Path:
    """What an installer leaves behind for a distribution: its metadata, as transformers reads it."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text("\n".join(packages))
    (info / "RECORD").write_text("".join(f"{package}/__init__.py,,\n" for package in packages))
    return site


def test_transformers_works_from_the_repository_root(root: Path) -> None:
    done = run(GUARD + USE, root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("works") and str(root) in done.stdout


def test_transformers_works_with_the_repository_on_the_path(root: Path, tmp_path: Path) -> None:
    done = run(GUARD + USE, tmp_path, root)
    assert done.returncode == 0, done.stderr


def test_transformers_works_where_quantgrid_is_installed(root: Path, tmp_path: Path) -> None:
    # Then transformers finds the folder's distribution to be quantgrid and takes quantgrid's version for it.
    site = tmp_path / "site"
    for package in ("kernels", "methods", "harness"):
        site.mkdir(exist_ok=True)
        (site / package).symlink_to(root / package)
    install(site, "quantgrid", project_version(root), ("kernels", "methods", "harness"))
    done = run(GUARD + USE, tmp_path, site)
    assert done.returncode == 0, done.stderr


def test_the_danger_is_real(root: Path, tmp_path: Path) -> None:
    # Without the guard, a version that transformers accepts breaks its import: the reason for all of this.
    done = run(USE, root, install(tmp_path, "kernels", ACCEPTED, ("kernels",)))
    assert done.returncode != 0 and "ImportError" in done.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_a_foreign_distribution_is_refused_in_one_line(root: Path, tmp_path: Path, version: str) -> None:
    done = run(GUARD + USE, root, install(tmp_path, "kernels", version, ("kernels",)))
    assert done.returncode != 0 and done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert f"'kernels' {version}" in lines[0] and "pip uninstall kernels" in lines[0]


def test_the_guard_imports_nothing_of_either_package(root: Path, tmp_path: Path) -> None:
    # The distribution's own code does not run, and the guard costs no heavy import.
    site = install(tmp_path, "kernels", ACCEPTED, ("kernels",))
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("raise SystemExit('imported')")
    loaded = "{'torch', 'transformers', 'kernels'} & set(sys.modules)"
    check = GUARD.replace("sys.exit(str(error))", f"print('refused', *{loaded})")
    done = run(check, site, site, root)
    assert (done.returncode, done.stdout.strip()) == (0, "refused"), done.stderr


def test_nothing_is_refused_here() -> None:
    try:
        installed = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        refuse_foreign_kernels()
    else:
        with pytest.raises(UserError, match=installed):
            refuse_foreign_kernels()


def test_kernels_imports_nothing(root: Path) -> None:
    code = "import sys; before = set(sys.modules); import kernels; print(sorted(set(sys.modules) - before))"
    assert run(code, root).stdout.strip() == "['kernels']"


def project_version(root: Path) -> str:
    line = next(x for x in (root / "pyproject.toml").read_text().splitlines() if x.startswith("version"))
    return line.split('"')[1]


def test_versions_lie_outside_what_transformers_accepts(root: Path) -> None:
    low, high = Version(import_utils.KERNELS_MIN_VERSION), Version(import_utils.KERNELS_MAX_VERSION)
    for ours in (kernels.__version__, project_version(root)):
        # The ranges of the transformers releases that we support start at 0.16 and move up.
        assert not low <= Version(ours) < high and Version(ours) < Version("0.16")
