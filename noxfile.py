"""All that can be run on this project. `nox` alone runs what CI runs.

Each backend has an environment of its own. Repeat a session without installing again by `-R`; pick
one backend by its tag, `nox -t jax`; give arguments after `--`, `nox -s "tests(jax)" -- -k saving`.
"""

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
# Wheels of this machine are found by pip, and not by other installers.
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_external_run = True

PYPROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = Path("constraints.txt").resolve()
MINIMUM_KERAS = next(
    requirement.partition(">=")[2]
    for requirement in PYPROJECT["project"]["dependencies"]
    if requirement.startswith("keras")
)
TRAINING_BACKENDS = ("tensorflow", "jax", "torch")
MNIST_RESULTS = Path("build/mnist")
EXAMPLES = (
    "vae",
    "heat_equation",
    "wgan_gp",
    "distillation",
    "segmentation",
    "uncertainty_weighting",
    "focal",
    "ppo",
    "native_loops",
    "ewc",
    "centre_loss",
    "perceptual",
)
BENCH_RESULTS = Path("benchmarks/results")
EXAMPLE_RESULTS = Path("build/examples")
SHIFTS = (10, 5)
# Appended to the README's first example, to see what it trained, and where the package comes from.
FIT = """
import importlib.metadata, pathlib, sys
import lossargs
assert 0 < history["kl_weight"][0] < 1, history
loaded = keras.saving.load_model("vae.keras")
for each in (model, loaded):
    logs = each.evaluate(data, data, verbose=0, return_dict=True)
    total = logs["mean_squared_error"] + logs["kl_weight"] * logs["kl"]
    assert abs(logs["loss"] - total) < 1e-4, logs
assert importlib.metadata.version("lossargs") == lossargs.__version__
assert pathlib.Path(sys.prefix) in pathlib.Path(lossargs.__file__).parents
print("trains with", lossargs.__file__, logs)
"""
# A core and some gigabytes for each process. Those of one file together: the code blocks of a page
# build on each other, and the tests of a module share what is slow to make.
PARALLEL = ["--numprocesses=auto", "--maxprocesses=4", "--dist=loadscope"]
# Tests of what no version of Keras changes, and of examples, which draw pictures.
ALIKE = (
    "test_derivative_examples.py",
    "test_examples.py",
    "test_isolation.py",
    "test_main.py",
    "test_site.py",
)

each_backend = nox.parametrize(
    "backend", [nox.param(b, id=b, tags=[b]) for b in (*TRAINING_BACKENDS, "numpy")]
)
each_training_backend = nox.parametrize(
    "backend", [nox.param(b, id=b, tags=[b]) for b in TRAINING_BACKENDS]
)


def install(
    session: nox.Session, *groups: str, package: bool = True, constraints: Path = CONSTRAINTS
) -> None:
    """Install dependency groups in the versions of CI, and this package as it stands here."""
    requirements = nox.project.dependency_groups(PYPROJECT, *groups)
    own = ["-e", "."] if package else []
    session.install("-c", str(constraints), *requirements, *own)


def other_versions(session: nox.Session, versions: dict[str, str | None]) -> Path:
    """The constraints of CI, with other versions of these packages; `None` leaves one free."""
    lines = [
        line
        for line in CONSTRAINTS.read_text().splitlines()
        if line.partition("==")[0] not in versions
    ]
    lines += [f"{package}=={version}" for package, version in versions.items() if version]
    path = Path(session.create_tmp()) / "constraints.txt"
    path.write_text("\n".join(lines))
    return path


def environment(backend: str) -> dict[str, str]:
    """What a process needs to run on this backend, and the tests to insist on it."""
    return {
        "KERAS_BACKEND": backend,
        "LOSSARGS_TEST_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": "1",  # PyTorch's threads would wait for those of the other processes
    }


def groups(backend: str) -> list[str]:
    """What the tests on a backend need."""
    # Keras exports from PyTorch by ONNX.
    return [backend, "test", "examples", "integrations", *(["onnx"] if backend == "torch" else [])]


def train_mnist(session: nox.Session, backend: str, *options: str) -> None:
    """Train the MNIST example with both shifts, and show the results there are."""
    MNIST_RESULTS.mkdir(parents=True, exist_ok=True)
    for shift in SHIFTS:
        result = MNIST_RESULTS / f"{backend}-{shift}"
        session.run(
            "python", "examples/mnist.py", f"--backend={backend}", f"--shift={shift}",
            f"--json={result}.json", f"--plot={result}.png", *options,
            env={"TF_CPP_MIN_LOG_LEVEL": "3"},
        )  # fmt: skip
    session.run("python", "examples/mnist_report.py", str(MNIST_RESULTS))


@nox.session(tags=["check"])
def lint(session: nox.Session) -> None:
    """Check style and format of the code (ruff); mend both by `nox -s lint -- --fix`."""
    install(session, "lint", package=False)
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]))


@nox.session(tags=["check"])
def typing(session: nox.Session) -> None:
    """Check the types of the package, and what they tell its users (mypy, pyright)."""
    install(session, "typing")
    session.run("mypy")
    session.run("pyright")


@nox.session(tags=["check"])
def review(session: nox.Session) -> None:
    """Review how the project is set up (sp-repo-review)."""
    install(session, "review", package=False)
    session.run("repo-review", ".", *session.posargs)


@nox.session(tags=["check"])
def docs(session: nox.Session) -> None:
    """Build the documentation site, warnings as errors; `-- serve` shows it on 127.0.0.1:8000."""
    install(session, "docs", package=False)
    command, *options = session.posargs or ["build"]
    if command == "serve":
        options.insert(0, "--dev-addr=127.0.0.1:8000")
    # The theme's news of what comes after it is no warning about this site.
    session.run("mkdocs", command, "--strict", *options, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def browser(session: nox.Session) -> None:
    """Build the site, and check each page in headless Chromium; pictures go to build/browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((path for name in names if (path := shutil.which(name))), None)
    if chromium is None:
        session.skip("there is no Chromium: `apt-get install chromium`")
    install(session, "docs", "browser", package=False)
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})
    # The tests of the package, and so their conftest.py, need Keras; these do not.
    session.run(
        "pytest", "--noconftest", "--no-showlocals", "tests_browser", *session.posargs,
        env={"CHROMIUM": chromium},
    )  # fmt: skip


@nox.session
def build(session: nox.Session) -> None:
    """Build wheel and sdist, check them, and run the README's first example with each."""
    install(session, "build", package=False)
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    files = [str(path) for path in Path("dist").iterdir()]
    session.run("twine", "check", "--strict", *files)
    session.run("python", "tests/release.py", *files)
    clean = Path(session.create_tmp()).resolve() / "clean"
    shutil.rmtree(clean, ignore_errors=True)
    session.run("python", "-m", "venv", str(clean))
    python = str(clean / ("Scripts" if os.name == "nt" else "bin") / "python")
    pip = [python, "-m", "pip"]
    jax = nox.project.dependency_groups(PYPROJECT, "jax")
    for file in files:
        session.run(*pip, "install", "-q", "-c", str(CONSTRAINTS), file, *jax, external=True)
        example = Path("README.md").read_text(encoding="utf-8").split("```python\n")[1]
        program = clean / "example.py"
        program.write_text(f"{example.partition('```')[0]}{FIT}", encoding="utf-8")
        with session.chdir(clean):
            session.run(python, str(program), external=True, env={"KERAS_BACKEND": "jax"})
            session.run(python, "-m", "lossargs", external=True, env={"KERAS_BACKEND": "jax"})
        session.run(*pip, "uninstall", "-q", "-y", "lossargs", external=True)


@nox.session
@each_backend
def tests(session: nox.Session, backend: str) -> None:
    """Run the tests, the examples of README and docstrings, and MNIST on one backend."""
    install(session, *groups(backend))
    arguments = session.posargs or [*PARALLEL, "--durations=5"]
    # Programs that run once are not worth much optimization. `nightly` has all of it.
    fast = {"XLA_FLAGS": "--xla_backend_optimization_level=0"} if backend == "jax" else {}
    variables = {**environment(backend), **fast}
    session.run("coverage", "run", "-m", "pytest", *arguments, env=variables)
    if not session.posargs and backend in TRAINING_BACKENDS:
        train_mnist(session, backend)


@nox.session(default=False)
@each_training_backend
def distributed(session: nox.Session, backend: str) -> None:
    """Test training on several devices and in several processes, with crashes, in minutes."""
    install(session, backend, "test", "examples")
    arguments = session.posargs or ["-m", "distributed", "--durations=5"]
    session.run("pytest", *arguments, env=environment(backend))


@nox.session(default=False)
@each_training_backend
def nightly(session: nox.Session, backend: str) -> None:
    """Test for minutes: 10,000 generated cases, killed runs, 20,000 steps, hundreds of models."""
    install(session, *groups(backend))
    variables = {**environment(backend), "HYPOTHESIS_PROFILE": "nightly"}
    chosen = ["-m", "nightly or properties", "--durations=5"]
    arguments = session.posargs or [*PARALLEL, *chosen]
    session.run("pytest", *arguments, env=variables)


@nox.session
def coverage(session: nox.Session) -> None:
    """Combine what the tests on all backends covered; 100 % is asked for."""
    session.install("-c", str(CONSTRAINTS), "coverage")
    session.run("coverage", "combine")
    session.run("coverage", "report")


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the tests on the oldest Keras that is supported, on torch."""
    numpy = next(d for d in PYPROJECT["project"]["dependencies"] if d.startswith("numpy"))
    oldest = {"keras": MINIMUM_KERAS, "numpy": f"{numpy.partition('>=')[2]}.*", "ml-dtypes": None}
    install(session, "torch", "test", constraints=other_versions(session, oldest))
    arguments = session.posargs or [*PARALLEL, "tests", *(f"--ignore=tests/{n}" for n in ALIKE)]
    session.run("pytest", *arguments, env=environment("torch"))


@nox.session(default=False)
@each_training_backend
def newest(session: nox.Session, backend: str) -> None:
    """Run the tests on the newest release of Keras that pip finds, on one backend."""
    constraints = other_versions(session, {"keras": None})
    install(session, *groups(backend), constraints=constraints)
    session.install("--upgrade", "-c", str(constraints), "keras")  # also if nox reuses this one
    session.run("pytest", *(session.posargs or PARALLEL), env=environment(backend))


@nox.session(default=False)
@each_training_backend
def keras_nightly(session: nox.Session, backend: str) -> None:
    """Run the tests on Keras of last night; if they fail, it is shown, and nox does not fail."""
    install(session, *groups(backend))
    # Two packages with the same files.
    session.run("python", "-m", "pip", "uninstall", "-q", "-y", "keras", "keras-nightly")
    session.install("--pre", "keras-nightly")
    arguments = session.posargs or PARALLEL
    names = ["--noconftest", "-q", "tests/test_keras_private.py"]  # without lossargs
    failed = []
    for chosen in (names, arguments):
        try:
            session.run("pytest", *chosen, env=environment(backend))
        except nox.command.CommandFailed:
            failed.append(" ".join(chosen))
    if failed:
        if "GITHUB_ACTIONS" in os.environ:
            print(f"::warning::on keras-nightly, {backend}, these fail: {'; '.join(failed)}")  # noqa: T201
        # The one state that nox neither counts as a failure nor calls a success.
        session.skip("the tests FAILED on keras-nightly, which they may; see above")


@nox.session(python=nox.project.python_versions(PYPROJECT), default=False)
def pythons(session: nox.Session) -> None:
    """Run the tests on one version of Python, on JAX; skipped where that Python is not found."""
    install(session, "jax", "test", "examples", "integrations")
    session.run("pytest", *(session.posargs or PARALLEL), env=environment("jax"))


@nox.session(default=False)  # `tests` ends with it
@each_training_backend
def mnist(session: nox.Session, backend: str) -> None:
    """Train the MNIST example with two shifts on one backend; `-- --data full` for all digits."""
    install(session, backend, "examples")
    train_mnist(session, backend, *session.posargs)


@nox.session(default=False)  # the tests run some of them, for a moment
@each_training_backend
def examples(session: nox.Session, backend: str) -> None:
    """Run the examples on one backend; `-- vae` runs one, `-- --site` draws for the site."""
    install(session, backend, "examples")
    EXAMPLE_RESULTS.mkdir(parents=True, exist_ok=True)
    options = [argument for argument in session.posargs if argument not in (*EXAMPLES, "--site")]
    for name in [name for name in EXAMPLES if name in session.posargs] or EXAMPLES:
        result = EXAMPLE_RESULTS / f"{name}-{backend}"
        picture = Path("docs") / name if "--site" in session.posargs else result
        session.run(
            "python", f"examples/{name}.py", f"--backend={backend}",
            f"--json={result}.json", f"--plot={picture}.png", *options,
            env={"TF_CPP_MIN_LOG_LEVEL": "3"},
        )  # fmt: skip


@nox.session(default=False)
@each_training_backend
def bench(session: nox.Session, backend: str) -> None:
    """Measure lossargs beside the hand-written way on one backend; `-- --turns 4` for a look."""
    install(session, backend)
    BENCH_RESULTS.mkdir(parents=True, exist_ok=True)
    if backend == "torch":
        session.run("python", "benchmarks/calls.py", f"--json={BENCH_RESULTS / 'calls-torch.json'}")
    for name, script in (("bench", "bench.py"), ("derivatives", "bench_derivatives.py")):
        session.run(
            "python", f"benchmarks/{script}", f"--backend={backend}",
            f"--json={BENCH_RESULTS / f'{name}-{backend}.json'}", *session.posargs,
            env={"TF_CPP_MIN_LOG_LEVEL": "3"},
        )  # fmt: skip
