"""Who may import whom: read from the source, so that no import at run time hides from it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("preprocess", "train", "shared", "storage_estimates")


def imported_modules(file: Path) -> set[str]:
    """Returns every module that a file imports, at its top or inside a function."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            modules.update({node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names})
    return modules


def files_that_import(package: str, folder: str) -> set[str]:
    """Returns the files under ``folder`` that import ``package`` or something inside it."""
    return {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / folder).rglob("*.py")
        if any(module == package or module.startswith(f"{package}.") for module in imported_modules(file))
    }


@pytest.mark.parametrize("importer", PACKAGES)
@pytest.mark.parametrize("imported", PACKAGES)
def test_packages_import_shared_and_never_each_other(importer: str, imported: str) -> None:
    if imported not in (importer, "shared"):
        assert files_that_import(imported, importer) == set()


@pytest.mark.parametrize("folder", PACKAGES)
def test_only_the_job_knows_ray(folder: str) -> None:
    assert {file for file in files_that_import("ray", folder) if not file.startswith("preprocess/job/")} == set()


def test_the_job_is_seen_to_import_ray() -> None:
    assert "preprocess/job/cluster.py" in files_that_import("ray", "preprocess")


@pytest.mark.parametrize("folder", ["preprocess", "shared", "storage_estimates"])
def test_only_train_knows_deepspeed(folder: str) -> None:
    assert files_that_import("deepspeed", folder) == set()


@pytest.mark.parametrize("forbidden", ["deepspeed", "torch.distributed", "train.parallel"])
def test_models_and_kernels_know_nothing_of_ranks(forbidden: str) -> None:
    assert files_that_import(forbidden, "train/model") | files_that_import(forbidden, "train/ops") == set()


@pytest.mark.parametrize("folder", ["storage_estimates"])
def test_the_estimator_imports_no_torch(folder: str) -> None:
    assert files_that_import("torch", folder) == set()


@pytest.mark.parametrize(
    "file",
    [
        "shared/spec.py",
        "shared/codec.py",
        "shared/costs.py",
        "shared/shard_size.py",
        "shared/bucketing.py",
        "shared/cache/layout.py",
        "shared/cache/zarr_layout.py",
        "shared/cache/dataset.py",
        "shared/clips/plan.py",
        "shared/clips/probes.py",
        "shared/encoders/vae_geometry.py",
        "preprocess/schedule.py",
        "preprocess/decode_ahead.py",
        "preprocess/job/driver.py",
        "shared/clips/decode.py",
        "shared/media/video.py",
        "train/online/worker.py",
        "train/stop.py",
    ],
)
def test_pure_files_import_no_torch(file: str) -> None:
    assert not any(module.split(".")[0] == "torch" for module in imported_modules(ROOT / file))


def test_the_driver_loads_no_torch() -> None:
    code = "import sys, preprocess.job.driver; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
