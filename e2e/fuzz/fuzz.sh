#!/bin/sh
# Runs one fuzz target, for make fuzz and make corpus. CORPUS is a folder in e2e/fuzz/corpus.
#
# fuzz.sh run SECONDS BINARY TEST CORPUS   fuzzes, starting with the corpus and the inputs of earlier runs
# fuzz.sh minimize -  BINARY TEST CORPUS   replaces the corpus by the fewest of these inputs that reach the same code
set -eu
verb=$1 seconds=$2 binary=$3 test=$4 corpus=e2e/fuzz/corpus/$5
artifacts=target/fuzz/artifacts/$5
mkdir -p "$artifacts" "$corpus"
run() {
    BOLERO_TEST_NAME=$test BOLERO_LIBTEST_HARNESS=1 BOLERO_LIBFUZZER_ARGS="$*" \
        "$binary" "$test" --exact --nocapture --quiet --test-threads 1 >"$artifacts.log" 2>&1
}
case $verb in
run)
    run "$artifacts" "$corpus" "-artifact_prefix=$artifacts/" "-max_total_time=$seconds" -timeout=10 -print_final_stats=1 || {
        grep -a -A 3 'panicked\|ERROR' "$artifacts.log"
        echo "$test: see $artifacts.log"
        exit 255
    }
    echo "$test: $(sed -n 's/.*number_of_executed_units: *//p' "$artifacts.log") inputs, none failed"
    ;;
minimize)
    minimal=$artifacts.minimal
    rm -rf "$minimal"
    mkdir "$minimal"
    run "$minimal" "$artifacts" "$corpus" -merge=1 -use_counters=0 -max_len=600
    rm -r "$corpus"
    mv "$minimal" "$corpus"
    echo "$test: $(find "$corpus" -type f | wc -l) inputs in the corpus"
    ;;
esac
