"""Test with the newest and with the oldest dependencies, and lint; `nox --list` names the sessions."""

import nox

PARALLEL = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]  # as in README.md


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
def tests(session: nox.Session) -> None:
    """Run the tests with the newest dependencies."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *(session.posargs or PARALLEL))


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """Run the tests with the oldest dependencies that pyproject.toml admits."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    unbounded = [requirement for requirement in requirements if ">=" not in requirement]
    if unbounded:
        session.error(f"expected a lower bound of each dependency; got {', '.join(unbounded)}")
    constraints = session.cache_dir / "oldest.txt"
    constraints.write_text("\n".join(requirement.replace(">=", "==") for requirement in requirements))
    session.install("-e", ".[test]", "--constraint", str(constraints))
    session.run("python", "-m", "pytest", *(session.posargs or PARALLEL))


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Check style, format and types, and build the reference."""
    session.install("-e", ".[test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "--no-error-summary")
    modules = ["pyroflows", *(f"pyroflows.{name}" for name in ("data", "diagnostics", "tables.estimator", "plots"))]
    reference = session.create_tmp()
    session.run("python", "-W", "error::UserWarning", "-m", "pdoc", "--math", "-d", "google", "-o", reference, *modules)
