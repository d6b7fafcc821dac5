"""What the processor's own instructions can do: multiply-adds per nanosecond on one core, from registers.

    python benchmarks/arithmetic.py

It tells whether a kernel for an instruction set would gain anything. The 16-bit row stands for float32 arithmetic on
bfloat16 weights: VDPBF16PS multiplies bfloat16 alone, so a float32 activation goes through it in two or three parts.
"""

import re
import subprocess
import tempfile
from pathlib import Path

_SOURCE = r"""
#include <immintrin.h>
#include <chrono>
#include <cstdio>

constexpr long TURNS = 20000000;
#define ALL(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define KEEP(i) asm volatile("" : "+v"(acc[i]));

// Twelve independent sums in registers; the best of five trials.
#define RATE(name, each, type, step)                                                     \
    {                                                                                    \
        double best = 0;                                                                 \
        for (int trial = 0; trial < 5; trial++) {                                        \
            type acc[12] = {};                                                           \
            auto begin = std::chrono::steady_clock::now();                               \
            for (long i = 0; i < TURNS; i++) { ALL(step) ALL(KEEP) }                     \
            std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - begin; \
            double rate = TURNS * 12.0 * each / spent.count();                           \
            if (rate > best) best = rate;                                                \
        }                                                                                \
        printf("%s %.0f\n", name, best);                                                \
    }

int main() {
    __m512 a = _mm512_set1_ps(1e-9f), b = a;
    asm volatile("" : "+v"(a), "+v"(b));
#define FMA(i) acc[i] = _mm512_fmadd_ps(a, b, acc[i]);
    RATE("VFMADD", 16, __m512, FMA)
#ifdef __AVX512BF16__
    __m512bh h = _mm512_cvtne2ps_pbh(a, b);
#define DPB(i) acc[i] = _mm512_dpbf16_ps(acc[i], h, h);
    RATE("VDPBF16PS", 32, __m512, DPB)
#endif
#ifdef __AVX512VNNI__
    __m512i u = _mm512_set1_epi8(1);
    asm volatile("" : "+v"(u));
#define DPU(i) acc[i] = _mm512_dpbusd_epi32(acc[i], u, u);
    RATE("VPDPBUSD", 64, __m512i, DPU)
#endif
}
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "arithmetic.cpp"), Path(folder, "arithmetic")
        source.write_text(_SOURCE)
        subprocess.run(["g++", "-O2", "-march=native", str(source), "-o", str(program)], check=True)
        told = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    rates = {name: float(rate) for name, rate in re.findall(r"^(\w+) (\d+)$", told, re.MULTILINE)}
    print("| instruction | multiply-adds per ns | beside VFMADD |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {rate / rates['VFMADD']:.2f} |")


if __name__ == "__main__":
    main()
