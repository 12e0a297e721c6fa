PY := .venv/bin/python

.PHONY: install demo test check soak bench

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@echo "installing into .venv"
	@set -e; if command -v uv >/dev/null; then UV=uv; [ -x $(PY) ] || uv venv -q --python '>=3.11' .venv; \
	else python3 -m venv .venv; .venv/bin/pip install -q uv; UV=.venv/bin/uv; fi; \
	$$UV pip install -q --python $(PY) -r requirements.txt; \
	$$UV pip install -q --python $(PY) --no-deps --no-build-isolation -e .; \
	$(PY) -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true  # else every process of a job compiles torch and timm anew
	@touch $@

demo: install
	@$(PY) launch/demo.py

test: install
	@sh tests/slurm/install.sh || true
	$(PY) -m pytest tests -n 2 --dist loadfile

soak: install
	KILLS=400 $(PY) -m pytest tests/test_kills.py -k kills_change
	KILLS=200 $(PY) -m pytest tests/test_interruptions.py -k random_kills -s

bench: install
	$(PY) benchmarks/loader.py
	$(PY) benchmarks/checkpoint.py
	$(PY) benchmarks/generate.py
	$(PY) benchmarks/claims.py
	$(PY) benchmarks/status.py
	$(PY) benchmarks/captions.py

check: install
	.venv/bin/ruff format --check launch generation stablerep tests benchmarks
	.venv/bin/ruff check launch generation stablerep tests benchmarks
	.venv/bin/mypy
