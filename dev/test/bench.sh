#!/usr/bin/env bash
# bench.sh: what --bench prints of the linear layers: every row is there, with the fewest bytes it needs, and rows, rates, shares
# and sums agree with each other. That the rows are what a step runs is section bench of test_llama.
source "$(dirname "$0")/lib.sh"

cat >bench.py <<'PYTHON'
import math, re, sys
import runner

# of lib.sh's MODEL: channels and rows of each linear layer, tokens of a micro-batch
SHAPES = {"qkv": (64, 192), "o": (64, 64), "gate_up": (64, 256), "down": (128, 64)}
BT, MASK, FLOAT = 256, 1 / 8, int(sys.argv[1])
NUMBER = r"(-?[0-9.e+-]+)"
ROW = re.compile(rf"op +(\S+) +(\S+) +(\d+) +{NUMBER} +{NUMBER} +{NUMBER}% +{NUMBER} (MB|GFLOP) +{NUMBER} "
                 rf"(TB/s|TFLOP/s) +{NUMBER}%  (\S.*)")
SUM = re.compile(rf"sum +(\S+) +(whole|net) +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}% +{NUMBER}% +{NUMBER}% +{NUMBER}% "
                 rf"+{NUMBER} +{NUMBER}%")

def close(text, value, slack):
    """What is printed is the value, up to half a unit of its last digit and the roundings of what the value is of."""
    digits = re.fullmatch(r"-?\d*\.?(\d*)(?:e([+-]\d+))?", text)
    unit = 10.0 ** (int(digits[2] or 0) - len(digits[1]))
    return abs(float(text) - value) <= 0.51 * unit + abs(slack) + 1e-9 * abs(value)

def expected(recipe, blocks, dense_first, recompute, saved):
    """(kind, part, operation) -> (calls, GFLOP or MB). FLOAT: bytes of the build. No carrier: the CPU."""
    quartet, rows = recipe == "quartet", {}
    made = 0.5 + 1 / 32 if quartet else 1.0                # an operand of backward, or what is read of a saved one
    kept = made + (MASK if quartet else 0.0)               # x and w
    forward, backward = (33 / 16, 33 / 16) if saved else (0, 2 * FLOAT)   # MXINT8 of gate and up that SwiGLU writes; reads
    again = blocks - 1 if recompute == "block" else 0      # all but the last one
    added = blocks if dense_first else blocks - 1          # entered behind another block
    for kind, (C, OC) in SHAPES.items():
        x, dy, w = BT * C / 1e6, BT * OC / 1e6, C * OC / 1e6
        def row(part, name, calls, work):
            if calls:
                rows[kind, part, name] = calls, work
        flops = 2 * BT * C * OC / 1e9
        row("gemm", "GEMM forward", blocks + (again if kind != "down" else 0), flops)
        row("gemm", "GEMM dX", blocks, flops)
        row("gemm", "GEMM dW", blocks, flops)
        if recipe == "bf16":
            continue
        if kind in ("qkv", "gate_up"):
            entered, alone = (added, blocks - added + again) if kind == "qkv" else (blocks + again, 0)
            row("quantize", "add + rmsnorm + quantize x", entered, x * (3 * FLOAT + kept))
            row("pass", "add + rmsnorm", entered, x * 4 * FLOAT)
            row("quantize", "rmsnorm + quantize x", alone, x * (FLOAT + kept))
            row("pass", "rmsnorm", alone, x * 2 * FLOAT)
        elif kind == "down":
            row("quantize", "swiglu + quantize x", blocks + again, x * (2 * FLOAT + forward + kept))
            row("pass", "swiglu", blocks + again, x * (3 * FLOAT + forward))
        else:
            row("quantize", "quantize x", blocks + again, x * (FLOAT + kept))
        row("quantize", "quantize dy", blocks, dy * (FLOAT + made))
        row("quantize", "quantize wt", blocks, w * (made + made))
        row("quantize", "quantize dyt", blocks, dy * (FLOAT + made))
        row("quantize", "quantize xt", blocks, x * (made + made))
        row("once", "quantize w", blocks, w * (FLOAT + kept))
        if not quartet:
            continue
        row("once", "unrotate dW", blocks, w * (2 * 4 + MASK))
        if kind == "down":
            row("finish", "unrotate + swiglu backward", blocks, x * (3 * FLOAT + backward + MASK))
            row("pass", "swiglu backward", blocks, x * (3 * FLOAT + backward))
        elif kind == "o":
            row("finish", "unrotate", blocks, x * (2 * FLOAT + MASK))
        else:
            row("finish", "unrotate + rmsnorm backward", blocks, x * (4 * FLOAT + MASK))
            row("pass", "rmsnorm backward", blocks, x * 4 * FLOAT)
    return rows

def rows(path, recipe, blocks, dense_first, recompute, saved):
    lines = open(path).read().splitlines()
    found = [ROW.fullmatch(line) for line in lines if line.startswith("op ")]
    assert found and not found[0], "the first line of the table is its head"
    assert all(found[1:]), f"{found[1:].count(None)} rows of another form"
    want = expected(recipe, int(blocks), int(dense_first), recompute, saved == "all")
    names = [(m[1], m[2], m[12]) for m in found[1:]]
    assert len(set(names)) == len(names), "a row stands twice"
    assert set(names) == set(want), f"rows that are not on both sides: {sorted(set(names) ^ set(want))}"
    ceilings = re.search(r"GEMM (\d+) GFLOP/s, copy ([\d.]+) GB/s", "\n".join(lines))
    step = float(re.search(r"^step +([\d.]+) ms", "\n".join(lines), re.M)[1])
    for m in found[1:]:
        name, (calls, work) = m[0], want[m[1], m[2], m[12]]
        gemm, each, total, share = m[2] == "gemm", float(m[4]), float(m[5]), float(m[6])
        assert int(m[3]) == calls, f"{calls} calls, not: {name}"
        assert (m[8] == "GFLOP") == gemm and (m[10] == "TFLOP/s") == gemm, f"units: {name}"
        assert close(m[7], work, 1e-3 * work / 2), f"{work:.5g} {m[8]}, not: {name}"
        assert close(m[5], each * calls, 0.5e-4 * calls), f"calls and times: {name}"
        assert close(m[6], 100 * total / step, 100 * (0.5e-3 / step + total / step * 0.06 / step)), f"share: {name}"
        assert share >= 0, f"share: {name}"    # above 100 where other work took the cores meanwhile
        rate, ceiling = work / each / (1 if gemm else 1e3), float(ceilings[1 if gemm else 2]) / 1e3
        assert close(m[9], rate, rate * 0.56e-4 / each), f"rate {rate:.4g}: {name}"
        of, unit = 100 * float(m[9]) / ceiling, 0.5e-3 if gemm else 0.05e-3     # the ceiling's last digit, halved
        assert close(m[11], of, of * (1.1 * unit / ceiling + 1e-3)), f"of the ceiling: {name}"
    sums(lines, found[1:], step, recipe)

def sums(lines, found, step, recipe):
    parts, counts = ("quantize", "gemm", "finish", "once"), {}
    for m in found:
        for kind in (m[1], "all"):
            counted = counts.setdefault(kind, {(part, net): [0.0, 0] for part in parts for net in (0, 1)})
            if m[2] != "pass":
                within = m[2]
            for net in (0, 1):
                if m[2] != "pass" or net:
                    counted[within, net][0] += float(m[5]) * (-1 if m[2] == "pass" else 1)
                    counted[within, net][1] += 1
    got = [SUM.fullmatch(line) for line in lines if line.startswith("sum ")]
    assert got and not got[0] and all(got[1:]), "lines of sums"
    want = [(kind, count) for kind in [*SHAPES, "all"] for count in ("whole", "net")[:1 if recipe == "bf16" else 2]]
    assert [(m[1], m[2]) for m in got[1:]] == want, f"sums of {[(m[1], m[2]) for m in got[1:]]}"
    for m in got[1:]:
        ms, net = {}, int(m[2] == "net")
        for part, column, share in zip(parts, (3, 4, 5, 10), (7, 8, 9, 11)):
            ms[part] = float(m[column])
            total, count = counts[m[1]][part, net]
            assert close(m[column], total, 0.51e-3 * count), f"{part}: {total:.3f}, not: {m[0]}"
            assert close(m[share], 100 * ms[part] / step, 100 * (0.5e-3 / step + abs(ms[part]) / step * 0.06 / step)), \
                f"share of {part}: {m[0]}"
        ratio = 100 * (ms["quantize"] + ms["finish"]) / ms["gemm"]
        assert close(m[6], ratio, 100 * 1.1e-3 / ms["gemm"] + ratio * 0.6e-3 / ms["gemm"]), f"ratio {ratio:.1f}: {m[0]}"

runner.run(globals(), ["rows"] + sys.argv[2:])
PYTHON
floats=4
train --version | grep -q BF16 && floats=2
bench_rows() { python3 bench.py $floats "$@"; }

# bench NAME ROWS-OF BLOCKS DENSE-FIRST RECOMPUTE SAVED-INT8 ARGUMENTS...: --bench runs, its output is in NAME.txt and agrees
bench() {
    check_exit "$1" 0 "" --bench "${MODEL[@]}" --batch-tokens 256 --device cpu --saved-int8 "$6" "${@:7}"
    cp out.txt "$1.txt"
    check "$1: rows and sums" bench_rows "$1.txt" "${@:2:5}"
}
bench quartet quartet 2 0 none none --recipe quartet
bench bf16 bf16 2 0 none none --recipe bf16
bench fp8 fp8 2 0 none none --recipe fp8
bench recompute quartet 2 0 block none --recipe quartet --recompute block --bwd-rounding sr
bench dense-block quartet 1 1 none none --recipe quartet --bf16-layers first:1
check "the dense block is not the one that is timed" grep -q '^linears *block 1, as are 1 of 2 blocks' dense-block.txt
bench all-dense bf16 2 0 none none --recipe quartet --bf16-layers first:2
bench saved quartet 2 0 none all --recipe quartet
check "what is kept as MXINT8 is packed and unpacked" test "$(grep -c '^\(pack as\|unpack\) MXINT8 .* 2 ' saved.txt)" = 2
check_fails "and else is not" grep -q '^\(pack as\|unpack\) MXINT8' quartet.txt

# ---------------------------------------------------------------------------------------------------------------------
# the checks see an error

# planted NAME SED-SCRIPT: quartet's output, changed
planted() {
    sed "$2" quartet.txt >planted.txt
    cmp -s quartet.txt planted.txt && { fail "planted: $1" "nothing was changed"; return; }
    check_fails "planted: $1" bench_rows planted.txt quartet 2 0 none none
}
check_fails "planted: rows of MXINT8" bench_rows saved.txt quartet 2 0 none none
planted "a row is missing" '/quantize xt$/{0,/quantize xt$/d}'
planted "another time" '/^op     down.*GEMM dW$/s/^\(.\{25\} *[0-9]*  *\)[0-9]/\17/'
planted "other bytes" '/^op     o .*quantize dy$/s/ \([0-9.]*\) MB/ 1\1 MB/'
planted "another sum" 's/^\(sum    all      whole  *\)[0-9]*/\19999/'
planted "another share" '/^sum    o        net/s/[0-9.]*%$/77.70%/'
finish
