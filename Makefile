PY := .venv/bin/python

.PHONY: install demo test check

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@echo "installing into .venv"
	@set -e; if command -v uv >/dev/null; then UV=uv; [ -x $(PY) ] || uv venv -q --python '>=3.11' .venv; \
	else python3 -m venv .venv; .venv/bin/pip install -q uv; UV=.venv/bin/uv; fi; \
	$$UV pip install -q --python $(PY) -r requirements.txt; \
	$$UV pip install -q --python $(PY) --no-deps --no-build-isolation -e .
	@touch $@

demo: install
	@$(PY) launch/demo.py

test: install
	@sh tests/slurm/install.sh || true
	$(PY) -m pytest tests

check: install
	.venv/bin/ruff format --check launch generation stablerep tests
	.venv/bin/ruff check launch generation stablerep tests
	.venv/bin/mypy
