"""What a build contains: every built-in configuration file, where the package finds it."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAPPED = ("hw_configs", "model_configs")


def files_under(folder: str) -> set[str]:
    """Files of a folder of the checkout, relative to its top; caches are not part of it."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths}


CONFIGURATION_FILES = sorted(set().union(*(files_under(folder) for folder in MAPPED)))


def build(kind: str, folder: Path) -> Path:
    """Build one distribution of the checkout, offline, and return its file."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_code_and_configuration(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == files_under("ttt_sim") | {f"ttt_sim/_data/{name}" for name in CONFIGURATION_FILES}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_finds_its_own_configuration(wheel: Path, tmp_path: Path) -> None:
    """Unpacked away from the checkout, the package uses the copies it brought along, and they are the same bytes."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"from ttt_sim.data_files import folder_path; print(*map(folder_path, {MAPPED}), sep='\\n')"
    # Isolated from the environment and the current folder, so that only the unpacked copy can be imported first.
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"
    done = subprocess.run([sys.executable, "-I", "-c", start], check=True, capture_output=True, text=True)
    assert [Path(line) for line in done.stdout.splitlines()] == [tmp_path / "ttt_sim/_data" / name for name in MAPPED]
    for name in CONFIGURATION_FILES:
        assert (tmp_path / "ttt_sim/_data" / name).read_bytes() == (ROOT / name).read_bytes()


def test_sdist_holds_what_a_clone_holds(tmp_path: Path) -> None:
    """The source distribution can run the tests and build the wheel again."""
    with tarfile.open(build("sdist", tmp_path)) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    folders = set().union(*map(files_under, ("ttt_sim", "tests", "notebooks", "docs", *MAPPED)))
    assert inside >= folders | {"LICENSE", "Makefile", "README.md", "pyproject.toml"}
