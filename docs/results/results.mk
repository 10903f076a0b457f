# What `make results` does: every folder of results is made once; delete its files to make it again.
#   TEXT=FILE     Shakespeare's text, where there is no network
#   ENGLISH=FILE  the King James Bible; without it, the program `bible` prints it (Debian's package bible-kjv)
#   IDX=FOLDER    the unpacked files of Fashion-MNIST; without it, they are downloaded (Debian: dataset-fashion-mnist)
#   SLOTS=2     runs at once
# The runs themselves stay in runs/results, where a sweep that was interrupted goes on.
RESULTS := docs/results
RUNS := runs/results
SLOTS ?= 2
SWEEPS := english-64 english-128 adamw-rates fashion-mnist fashion-accasro shakespeare-64 paper-settings start-rates accasro asgo track3-english why
DATA-paper-settings := english-bytes
DATA-english-64 := english-bytes
DATA-fashion-mnist := fashion-images
DATA-fashion-accasro := fashion-images
OPTIONS-english-64 := --until-certain
OPTIONS-shakespeare-64 := --until-certain
DATA-english-128 := english-bytes
DATA-adamw-rates := english-bytes
DATA-why := english-bytes
DATA-track3-english := english-bytes
COMPARE-track3-english := --rule $(RESULTS)/track3-english/track3-english.toml
OPTIONS-english-128 := --until-certain
DATA-start-rates := english-bytes
OPTIONS-fashion-mnist := --until-certain
OPTIONS-accasro := --until-certain --against both-as-preset --max-seeds 7
OPTIONS-asgo := --until-certain --against as-preset --max-seeds 7
# Which figures of a comparison the pages show, and which values of layer figures are kept.
FIGURES-paper-settings := loss-steps layers/accasro-s4/layer-scales layers/asro-s4/layer-scales
FIGURES-english-64 := loss-steps differences tuning-budget
FIGURES-shakespeare-64 := loss-steps differences tuning-budget
FIGURES-english-128 := loss-steps differences tuning-budget
FIGURES-adamw-rates := sensitivity
FIGURES-why := $(foreach run,asgo-s1 adamw-s1,$(foreach figure,steps losses spectra,layers/$(run)/shadow-$(figure)))
VALUES-why := $(foreach run,asgo-s1 adamw-s1,$(run)/shadow-steps.csv $(run)/shadow-steps.md)
VALUES-paper-settings := accasro-s4/layer-statistics.csv asro-s4/layer-statistics.csv
LOW-RATE := accasro asro adam-constant-7.5e-5 adam-slow-warm-up adam-cosine-1e-3
FIGURES-start-rates := sensitivity
FIGURES-fashion-mnist := final-accuracies differences tuning-budget
FIGURES-accasro := settings
FIGURES-asgo := settings
FIGURES-track3-english := loss-steps differences tuning-budget
BENCHES := optimizers train data loader

.PHONY: results
results: $(VENV)/.dev $(RESULTS)/functions/functions.json $(RESULTS)/ngrams/ngrams.md $(SWEEPS:%=$(RESULTS)/%/entries.csv) $(RESULTS)/start-rates/scales.csv $(RESULTS)/paper-settings/low-rate-loss-steps.png $(RESULTS)/why/asgo-s1-directions.csv $(BENCHES:%=$(RESULTS)/costs/%.txt)
	$(BIN)/asgo claim $(RESULTS)/claims/*.toml --slots $(SLOTS) --table $(RESULTS)/claims/claims.md
	$(BIN)/python $(RESULTS)/assemble.py

$(RESULTS)/functions/functions.json:
	mkdir -p $(RUNS)
	$(BIN)/asgo viz all --out $(RESULTS)/functions/functions.png --json > $(RUNS)/functions.json
	mv $(RUNS)/functions.json $@

$(RESULTS)/ngrams/ngrams.md:
	$(MAKE) $(RUNS)/english-bytes/manifest.json $(RUNS)/data/manifest.json
	$(BIN)/python $(RESULTS)/ngrams.py $@ "English text, bytes=$(RUNS)/english-bytes" "Shakespeare, characters=$(RUNS)/data"

$(RESULTS)/%/entries.csv:
	$(MAKE) $(RUNS)/$(or $(DATA-$*),data)/manifest.json
	$(BIN)/asgo sweep $(RESULTS)/$*/sweep.toml --out $(RUNS)/$* --slots $(SLOTS) $(OPTIONS-$*)
	$(BIN)/asgo compare $(RUNS)/$* --out $(RUNS)/reports/$* $(COMPARE-$*)
	$(foreach figure,$(FIGURES-$*),cp $(RUNS)/reports/$*/figures/$(figure).png $(RESULTS)/$*/$(subst /,-,$(figure:layers/%=%)).png; ) \
		$(foreach file,$(VALUES-$*),cp $(RUNS)/reports/$*/figures/layers/$(file) $(RESULTS)/$*/$(subst /,-,$(file)); ) \
		cp $(RUNS)/reports/$*/tables/* $(RESULTS)/$*/

$(RESULTS)/paper-settings/low-rate-loss-steps.png: | $(RESULTS)/paper-settings/entries.csv
	$(BIN)/asgo compare $(LOW-RATE:%=$(RUNS)/paper-settings/%-s*) --out $(RUNS)/reports/low-rate
	cp $(RUNS)/reports/low-rate/figures/loss-steps.png $@

$(RESULTS)/start-rates/scales.csv: | $(RESULTS)/start-rates/entries.csv
	$(BIN)/python $(RESULTS)/scales.py $(RUNS)/start-rates $(RESULTS)/start-rates

$(RESULTS)/why/asgo-s1-directions.csv: | $(RESULTS)/why/entries.csv
	$(BIN)/python $(RESULTS)/directions.py $(RESULTS)/why

$(RESULTS)/costs/%.txt:
	mkdir -p $(RUNS)
	$(BIN)/asgo bench $* > $(RUNS)/$*.txt
	mv $(RUNS)/$*.txt $@

$(RUNS)/data/manifest.json:
	$(BIN)/asgo data shakespeare --out $(RUNS)/data $(if $(TEXT),--input $(TEXT))

$(RUNS)/english-bytes/manifest.json:
	mkdir -p $(RUNS)/text
	$(if $(ENGLISH),cp $(ENGLISH),bible -l 1000 gen1:1-rev22:21 >) $(RUNS)/text/kjv.txt
	$(BIN)/asgo data text $(RUNS)/text/kjv.txt --tokenizer bytes --val-fraction 0.05 --out $(RUNS)/english-bytes

$(RUNS)/fashion-images/manifest.json:
	mkdir -p $(RUNS)/torchvision/FashionMNIST/raw
	$(if $(IDX),cp $(IDX)/*ubyte $(RUNS)/torchvision/FashionMNIST/raw/)
	$(BIN)/asgo data images torchvision:FashionMNIST --root $(RUNS)/torchvision --download --out $(RUNS)/fashion-images
