import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools import check_wheel, cuda_check, cuda_kernels, standins  # noqa: E402

needs_compiler = pytest.mark.skipif(not (shutil.which("cc") and shutil.which("readelf")), reason="needs cc and readelf")
TAG = f"cp3{sys.version_info.minor}"


def modules(*names: str) -> list:
    return [check_wheel.MODULE.fullmatch(f"memloc_ext/{name}.so") for name in names]


def test_a_wheel_holds_the_package_and_nothing_else() -> None:
    names = [*sorted(check_wheel.expected_files()), "memloc_ext/_C.abi3.so", "memloc_ext-0.1.0.dist-info/RECORD"]
    own = modules("_C.abi3")
    assert check_wheel.check_files(names, own) == []
    assert check_wheel.check_files([*names, "csrc/library.cpp"], own) == ["csrc/library.cpp is in it"]
    assert check_wheel.check_files([*names, "memloc_ext/_C.so"], own) == ["memloc_ext/_C.so is in it"]
    assert check_wheel.check_files(names[1:], own) == [f"{names[0]} is not in it"]
    assert check_wheel.check_files([name for name in names if ".so" not in name], []) != []


def test_tags_follow_the_modules() -> None:
    machine = check_wheel.sysconfig.get_platform().partition("-")[2].replace("-", "_")

    def wrong(tag: str, *names: str, platform: str = f"manylinux_2_34_{machine}") -> list[str]:
        wheel = Path(f"memloc_ext-0.1.0-{tag}-{platform}.whl")
        return check_wheel.check_tags(wheel, modules(*names), f"Tag: {tag}-{platform}\n")

    host = f"_host.cpython-3{sys.version_info.minor}-x86_64-linux-gnu"
    assert wrong(f"{TAG}-{TAG}", "_C.abi3", "_C_cuda.abi3", host) == []
    assert wrong("cp310-abi3", "_C.abi3") == []
    assert "its tag has to be cp310-abi3-" in wrong(f"{TAG}-{TAG}", "_C.abi3")[0]
    assert f"its tag has to be {TAG}-{TAG}-" in wrong("cp310-abi3", "_C.abi3", host)[0]
    assert "is for one Python only" in wrong("cp310-abi3", f"_C.cpython-3{sys.version_info.minor}")[0]
    assert "-manylinux_*, got cp310-abi3-linux_" in wrong("cp310-abi3", "_C.abi3", platform=f"linux_{machine}")[0]
    assert "-manylinux_*, got" in wrong("cp310-abi3", "_C.abi3", platform="manylinux_2_34_mips")[0]


@needs_compiler
def test_a_library_that_needs_a_later_glibc_than_its_tag_is_refused(tmp_path: Path) -> None:
    library = tmp_path / "_C.so"
    (tmp_path / "a.c").write_text('#include <stdio.h>\nvoid say(void) { puts("x"); }')
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "a.c"], check=True)
    (wrong,) = check_wheel.check_glibc(library, "memloc_ext-0.1.0-cp310-abi3-manylinux_2_1_x86_64.whl")
    assert "later than the tag says" in wrong
    assert check_wheel.check_glibc(library, "memloc_ext-0.1.0-cp310-abi3-manylinux_2_99_x86_64.whl") == []


@needs_compiler
def test_what_keeps_a_library_from_other_machines(tmp_path: Path) -> None:
    source = tmp_path / "a.c"
    source.write_text('const char* where(void) { return "' + str(ROOT) + '/csrc/library.cpp"; }')

    def wrong(*flags: str) -> str:
        library = tmp_path / "_C.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, *flags], check=True)
        return "\n".join(check_wheel.check_library(library))

    assert "names a path of the machine that built it" in wrong("-s")
    source.write_text("int one(void) { return 1; }")
    assert wrong("-s") == ""
    assert "has a section .symtab" in wrong()
    assert "has a section .debug_info" in wrong("-g")
    assert "has a RUNPATH: /opt/lib" in wrong("-s", "-Wl,--enable-new-dtags,-rpath,/opt/lib")
    other = tmp_path / "libother.so"
    subprocess.run(["cc", "-shared", "-o", other, source, "-Wl,-soname,libother.so"], check=True)
    assert "needs libother.so" in wrong("-s", "-Wl,--no-as-needed", str(other))


def test_a_wheel_that_is_too_large_or_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "memloc_ext-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("memloc_ext-0.1.0.dist-info/WHEEL", "Tag: py3-none-any\n")
    monkeypatch.setitem(check_wheel.MOST_BYTES, "without CUDA kernels", 10)
    wrong = "\n".join(check_wheel.check_wheel(wheel))
    assert "memloc_ext/__init__.py is not in it" in wrong
    assert "got py3-none-any" in wrong
    assert "may take 10 bytes, got" in wrong


def kernel(
    name: str, source: str = "linear_ablation_kernel", arch: str = "80", **figures: object
) -> cuda_kernels.Kernel:
    wide = {"loads": Counter({16: 1, 4: 9}), "stores": Counter({16: 1})}
    return cuda_kernels.Kernel(source, name, arch, 40, 0, 0, 0, **{**wide, **figures})  # pyright: ignore[reportArgumentType]


def test_spills_and_narrow_accesses_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_check, "WIDE", {("linear_ablation_kernel", "linear_kernel"): ("loads", "stores")})
    monkeypatch.setattr(cuda_check, "TENSOR_CORE", {})
    fine = [kernel("linear_kernel<__half, 8>"), kernel("linear_kernel<float, 1>", stores=Counter({4: 1}))]
    assert cuda_check.problems(fine) == []
    narrow = kernel("linear_kernel<float, 4>", stores=Counter({4: 4}))
    assert cuda_check.problems([narrow]) == [
        "linear_ablation_kernel: linear_kernel<float, 4> has no stores of 16 bytes on sm_80"
    ]
    assert "there is no linear_kernel" in cuda_check.problems(fine[1:])[0]
    spilling = kernel("other_kernel")
    spilling.spilled = 8
    assert cuda_check.problems([*fine, spilling]) == ["linear_ablation_kernel: other_kernel spills on sm_80"]


def test_kernels_without_tensor_cores_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_check, "WIDE", {})
    monkeypatch.setattr(cuda_check, "TENSOR_CORE", {("product", "multiply<__half"): ("hmma", "ldgsts")})
    fine = [kernel("multiply<__half, 8>", "product", hmma=4, ldgsts=2), kernel("multiply<float, 8>", "product")]
    assert cuda_check.problems(fine) == []
    assert cuda_check.problems([kernel("multiply<__half, 8>", "product", hmma=4)]) == [
        "product: multiply<__half, 8> has no LDGSTS on sm_80"
    ]
    assert "there is no multiply<__half" in cuda_check.problems(fine[1:])[0]


def test_ptxas_is_read_kernel_by_kernel() -> None:
    entry = (
        "ptxas info    : Compiling entry function '{}' for 'sm_90a'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used {} registers, used 1 barriers{}\n"
    )
    text = entry.format("first", 40, "") + entry.format("second", 64, ", 2048 bytes smem")
    first, second = cuda_kernels.PTXAS.finditer(text)
    assert first.group("name", "arch", "stores", "loads", "registers", "shared") == (
        "first",
        "90a",
        "4",
        "12",
        "40",
        None,
    )
    assert second.group("name", "registers", "shared") == ("second", "64", "2048")


@needs_compiler
def test_a_library_loads_with_stand_ins_for_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "real").mkdir()
    real, versions, library = tmp_path / "real" / "libgpu.so.1", tmp_path / "map", tmp_path / "torch" / "libtorch.so"
    versions.write_text("GPU_1 { gpu_count; };\n")
    (tmp_path / "real.c").write_text("int gpu_count(void) { return 2; }")
    (tmp_path / "own.c").write_text("int gpu_count(void); int count(void) { return gpu_count(); }")
    linked = ["-Wl,-soname=libgpu.so.1", f"-Wl,--version-script={versions}"]
    subprocess.run(["cc", "-shared", "-fPIC", "-o", real, tmp_path / "real.c", *linked], check=True)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "own.c", real], check=True)
    absent, wanted = standins.missing([library])
    assert absent == {"libgpu.so.1": {"GPU_1"}}
    standins.write(tmp_path / "torch" / "libgpu.so.1", absent["libgpu.so.1"], wanted)
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).count())"
    environment = {"LD_LIBRARY_PATH": str(tmp_path / "torch")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "100\n"
