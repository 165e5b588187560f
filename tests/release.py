"""Checks the files that are released, for `nox -s build`: `python tests/release.py dist/*`."""

import email
import re
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def check_changelog(version: str, changelog: str) -> None:
    """The newest heading is this version; or, while one is Unreleased, an earlier one or none."""
    first, *headings = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    if first == "Unreleased":
        earlier = [heading for heading in headings if numbers(heading) >= numbers(version)]
        assert not earlier, f"{version} is not after {earlier}, and CHANGELOG.md has [Unreleased]"
    else:
        assert first == version, f"the package is {version}, the newest of CHANGELOG.md {first}"


def check_metadata(text: str, version: str) -> None:
    """Versions, links and classifiers are complete, and no link of the README is relative."""
    metadata = email.message_from_string(text)
    assert metadata["Version"] == version
    assert metadata["License-Expression"] == PROJECT["license"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    links = dict(link.split(", ") for link in metadata.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= links.keys(), links
    assert all(link.startswith("https://") for link in links.values()), links
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    minors = {int(c.rpartition("3.")[2]) for c in classifiers if " :: 3." in c}
    assert minors == set(range(11, max(minors) + 1)), f"Python versions: {minors}"
    readme = metadata.get_payload()
    assert len(readme) > 1000
    relative = re.findall(r"\]\((?!https://|#)[^)]*\)", readme)
    assert not relative, f"relative links of the README: {relative}"
    for picture in re.findall(r"!\[[^\]]*\]\((.+?)\)", readme):
        assert f"/v{version}/" in picture, picture
        assert (ROOT / picture.partition(f"/v{version}/")[2]).exists(), picture


def check_wheel(path: Path, version: str) -> None:
    """The package with `py.typed`, the licence, and nothing else."""
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        info = f"lossargs-{version}.dist-info"
        check_metadata(wheel.read(f"{info}/METADATA").decode(), version)
    source = ROOT / "src"
    modules = {str(file.relative_to(source)) for file in source.rglob("*.py")}
    own = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
    assert names == {*modules, "lossargs/py.typed", *(f"{info}/{name}" for name in own)}, names


def check_sdist(path: Path, version: str) -> None:
    """What it takes to build, read and test it, and less than 1 MB."""
    folder = f"lossargs-{version}/"
    with tarfile.open(path) as sdist:
        names = {name.removeprefix(folder) for name in sdist.getnames()}
        check_metadata(sdist.extractfile(f"{folder}PKG-INFO").read().decode(), version)
    needed = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "src/lossargs/py.typed"}
    needed |= {"noxfile.py", "constraints.txt", "conftest.py", "examples/mnist.py"}
    assert needed <= names, needed - names
    assert {f"tests/{file.name}" for file in (ROOT / "tests").glob("*.py")} <= names
    strange = [name for name in names if re.search(r"__pycache__|^build|^dist|\.png$|^\.nox", name)]
    assert not strange, strange
    assert path.stat().st_size < 1_000_000, path.stat().st_size


def main() -> None:
    source = (ROOT / "src/lossargs/__init__.py").read_text()
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]
    check_changelog(version, (ROOT / "CHANGELOG.md").read_text())
    paths = [Path(argument) for argument in sys.argv[1:]]
    assert sorted(path.suffix for path in paths) == [".gz", ".whl"], paths
    for path in paths:
        (check_wheel if path.suffix == ".whl" else check_sdist)(path, version)
        print(f"{path}: complete, {path.stat().st_size // 1000} kB")  # noqa: T201


if __name__ == "__main__":
    main()
