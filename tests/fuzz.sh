#!/bin/sh
# One fuzzer of the library's unit tests: make fuzz, make corpus.
#
# fuzz.sh look SECONDS BINARY NAME KNOWN   looks, beginning with what is known and what was found before
# fuzz.sh keep -       BINARY NAME KNOWN   of all that, the least which comes to every line is what is known from then on
set -eu
verb=$1 seconds=$2 binary=$3 name=$4 known=$5
found=target/fuzz/found/$name
mkdir -p "$found" "$known"
run() {
    BOLERO_TEST_NAME=$name BOLERO_LIBTEST_HARNESS=1 BOLERO_LIBFUZZER_ARGS="$*" \
        "$binary" "$name" --exact --nocapture --quiet --test-threads 1 >"$found.log" 2>&1
}
case $verb in
look)
    run "$found" "$known" "-artifact_prefix=$found/" "-max_total_time=$seconds" -timeout=10 -print_final_stats=1 || {
        grep -a -A 3 'panicked\|ERROR' "$found.log"
        echo "$name: see $found.log"
        exit 255
    }
    echo "$name: $(sed -n 's/.*number_of_executed_units: *//p' "$found.log") inputs, nothing found"
    ;;
keep)
    least=$found.least
    rm -rf "$least"
    mkdir "$least"
    run "$least" "$found" "$known" -merge=1 -use_counters=0 -max_len=600
    rm -r "$known"
    mv "$least" "$known"
    echo "$name: $(find "$known" -type f | wc -l) inputs are known"
    ;;
esac
