# Every target sets itself up: it creates .venv once, installs the pinned requirements and builds what changed.
# `make VENV= test` uses the current environment instead and installs nothing into it: for a machine with a torch of its own.
VENV ?= .venv
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml tools/cuda_toolkit.py
ACTIVATE := $(if $(VENV),PATH="$(abspath $(VENV))/bin:$$PATH",)
PYTHON := $(ACTIVATE) python3
# a build with other switches is another build
SWITCHES := $(MEMLOC_CUDA)|$(MEMLOC_CUDA_ARCHS)|$(TORCH_CUDA_ARCH_LIST)|$(MEMLOC_HOST)|$(CUDA_HOME)
# the runtimes of the sanitizers, loaded before Python, which is built without
SANITIZERS = $$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)
# new memory is all NaN, so that what a kernel leaves unwritten shows
SANITIZER_OPTIONS := ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_malloc_fill_size=1048576:malloc_fill_byte=255 UBSAN_OPTIONS=print_stacktrace=1
# a process for each hardware thread, at most 8; in another environment pytest-xdist may be missing
parallel = $(if $(VENV),-n logical --maxprocesses 8 -p no:benchmark --dist $(1))
READY := build/.ready$(if $(VENV),,-current)

.PHONY: demo test sanitize bench docs lint wheel cuda-check cuda-report cuda-on-cpu cuda-test cuda-sanitize build clean FORCE
.DELETE_ON_ERROR:

demo: $(READY)  ## the study on real digits: a table, and a report to open in a browser
	$(PYTHON) -m memloc_ext run --edited 5 --width 0.25 --p-gen 0.3

# threads that spin while they wait for each other take the cores from other processes; a process alone is faster so
test sanitize bench cuda-on-cpu: export OMP_WAIT_POLICY ?= passive
test sanitize cuda-on-cpu: export OMP_NUM_THREADS ?= 1  # processes share the cores; a test that needs more threads sets them
test: $(READY)  ## all tests, or those of TESTS; those marked cuda are skipped without a GPU
	$(PYTHON) -m pytest $(call parallel,loadfile --no-loadscope-reorder) $(TESTS)

cuda-test: $(READY)  ## tests that need a GPU, and nothing else
	MEMLOC_REQUIRE_CUDA=1 $(PYTHON) -m pytest -m cuda

bench: $(READY)  ## benchmarks, peers included; results under bench/results
	$(if $(VENV),$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt)
	$(PYTHON) -m bench

docs: $(if $(VENV),$(VENV)/.installed,)  ## the site, in build/docs; fails on a broken link
	$(if $(VENV),$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet --strict
	@echo build/docs/index.html

sanitize: $(READY)  ## the operators' tests with AddressSanitizer and UndefinedBehaviorSanitizer in the CPU kernels
	MEMLOC_SANITIZE=1 MEMLOC_CUDA=0 MEMLOC_HOST=0 $(PYTHON) setup.py --quiet build --build-base build/sanitize
	cd build/sanitize && PYTHONPATH="$$(echo "$$PWD"/lib*)" LD_PRELOAD="$(SANITIZERS)" $(SANITIZER_OPTIONS) \
		$(ACTIVATE) pytest -q $(call parallel,worksteal) -p no:cacheprovider --capture=sys $(abspath python_tests/ops) -m 'not cuda'

lint: $(READY)
	$(ACTIVATE) ruff check .
	$(ACTIVATE) ruff format --check .
	$(ACTIVATE) clang-format --dry-run --Werror $$(find csrc tools python_tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(ACTIVATE) pyright

# One for this Python, with the pybind11 module, and one for every Python from 3.10 on, without; they share compiled objects,
# but not the folders that are packed, with all that an earlier build left there.
wheel: export MEMLOC_CUDA_ARCHS := $(or $(MEMLOC_CUDA_ARCHS),$(TORCH_CUDA_ARCH_LIST),8.0+PTX;9.0a;10.0;12.0)
wheel: $(if $(VENV),$(VENV)/.installed,)  ## dist/*.whl, two of them; with CUDA kernels where torch and the toolkit have CUDA
	rm -rf dist build/wheel
	for host in 1 0; do \
		rm -rf build/lib.* build/bdist.*; \
		MEMLOC_HOST=$$host $(PYTHON) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel . || exit 1; \
	done
	for wheel in build/wheel/*.whl; do \
		$(ACTIVATE) auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcuda.so*' \
			--wheel-dir dist $$wheel || exit 1; \
	done
	@ls dist

cuda-check: $(READY)  ## compile and link every .cu without a GPU; fail on a register spill, or narrow loads where wide ones belong
	$(PYTHON) tools/cuda_check.py

cuda-report: $(READY)  ## the same for every architecture of bench/results/kernels.json, which it writes
	$(PYTHON) tools/cuda_check.py --report

cuda-sanitize: $(READY)  ## the operators' tests on a GPU under compute-sanitizer: memory, races, uninitialized reads, barriers
	for tool in $(or $(TOOL),memcheck racecheck initcheck synccheck); do \
		echo "compute-sanitizer --tool $$tool"; \
		MEMLOC_REQUIRE_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(ACTIVATE) compute-sanitizer --tool $$tool --error-exitcode 9 \
			python3 -m pytest -q -m cuda -k 'not graph and not 32_bits and not compile and not opcheck' python_tests/ops || exit 1; \
	done

cuda-on-cpu: $(READY)  ## the tests that need a GPU, with the CUDA kernels run on the CPU, sanitizers in them; see tools/cuda_on_cpu
	LD_PRELOAD="$(SANITIZERS)" $(SANITIZER_OPTIONS) $(PYTHON) -m pytest -q $(call parallel,worksteal) --capture=sys -p tools.cuda_on_cpu.plugin \
		-k 'cuda and not elsewhere and not two_devices and not 70000 or hostile' python_tests/ops

build: $(READY)

clean:
	rm -rf build dist *.egg-info memloc_ext/*.so

build/.switches: FORCE
	@mkdir -p build
	@echo '$(SWITCHES)' | cmp -s - $@ || { rm -f memloc_ext/*.so; echo '$(SWITCHES)' >$@; }

ifneq ($(VENV),)
$(READY): $(VENV)/.installed $(SOURCES) build/.switches
	$(PYTHON) setup.py --quiet build_ext --inplace
	MEMLOC_EXTENSIONS=0 $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@mkdir -p build && touch $@

$(VENV)/.installed: requirements-dev.txt tools/mend_torchvision.py
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 for its pinned tools")'
	test -x $(VENV)/bin/python3 || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(PYTHON) tools/mend_torchvision.py
	@touch $@
else
$(READY): $(SOURCES) build/.switches
	$(PYTHON) setup.py --quiet build_ext --inplace
	@mkdir -p build && touch $@
endif
