// Runs programs: lists of operations, one after the other, each by all threads. The C ABI that Python calls.
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "plan.h"
#include "table.h"

// build.py defines TGI_ISAS(DO): DO(avx2) DO(avx512) …
#define DECLARE(isa) extern const Table tgi_table_##isa;
TGI_ISAS(DECLARE)

namespace {

struct Isa {
    const char* name;
    const Table* table;
};
#define LIST(isa) {#isa, &tgi_table_##isa},
const Isa isas[] = {TGI_ISAS(LIST)};

bool runs_here(const char* name) {
#if defined(__x86_64__)
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx512")) return avx512;
    if (!strcmp(name, "avx512vnni")) return avx512 && __builtin_cpu_supports("avx512vnni");
    return false;
#else
    return true;
#endif
}

Entry entries[KINDS];

void choose(const Isa& isa) {
    for (const Entry& entry : isa.table->entries) entries[entry.kind] = entry;
}

// Where threads meet between operations. They wait actively for some microseconds, then asleep: so a thread whose core
// somebody else has taken finds another one free.
struct alignas(64) Meeting {
    std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};
    std::atomic<int> asleep{0};

    void meet(int count) {
        int now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1);
            if (asleep.load()) wake();
            return;
        }
        for (int spins = 0; spins < 1000; spins++) {
            if (round.load(std::memory_order_acquire) != now) return;
            relax();
        }
        asleep.fetch_add(1);
        while (round.load() == now) sleep(now);
        asleep.fetch_sub(1);
    }

#if defined(__linux__)
    void sleep(int now) { syscall(SYS_futex, &round, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0); }
    void wake() { syscall(SYS_futex, &round, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
    void sleep(int) { std::this_thread::yield(); }
    void wake() {}
#endif
};

struct alignas(64) Counter {
    std::atomic<int> next{0};
};

double* profile = nullptr;  // [KINDS] seconds

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

extern "C" {

// The instruction sets that were compiled in and run here, best last, separated by blanks.
void tgi_isas(char* names, int size) {
    names[0] = 0;
    for (const Isa& isa : isas) {
        if (!runs_here(isa.name)) continue;
        if (names[0]) strncat(names, " ", size - strlen(names) - 1);
        strncat(names, isa.name, size - strlen(names) - 1);
    }
}

int tgi_choose(const char* name) {
    for (const Isa& isa : isas)
        if (!strcmp(isa.name, name) && runs_here(name)) return choose(isa), 0;
    return -1;
}

// Of the structs that Python writes: operations by kind, then others.
int64_t tgi_size(int which) {
    static const int64_t sizes[] = {sizeof(Linear),  sizeof(Quantize), sizeof(Norm),    sizeof(Embed), sizeof(Angles),
                                    sizeof(Turn),    sizeof(Attend),   sizeof(Pick),    sizeof(Head),  sizeof(Sample),
                                    sizeof(Route),   sizeof(Arrange),  sizeof(Experts), sizeof(Mix),   sizeof(Exchange),
                                    sizeof(Choice),  sizeof(Step),     sizeof(Program), sizeof(Link)};
    return which < (int)(sizeof sizes / sizeof *sizes) ? sizes[which] : -1;
}

// Adds up the seconds of each kind of operation in `seconds` [KINDS] from now on; null ends it. Of operations on rows that
// run together, the first stands for all.
void tgi_profile(double* seconds) { profile = seconds; }

// To be called when a step's segments are written, before its layers run.
void tgi_plan(Step* step, int threads) { plan(*step, threads); }

// The programs one after the other, by one team of threads.
void tgi_run(const Program* programs, int count, int threads) {
    static std::vector<Counter> counters;  // one caller at a time: the engine's loop
    int all = 0;
    for (int p = 0; p < count; p++) all += programs[p].ops;
    if ((int)counters.size() < all) counters = std::vector<Counter>(all);
    for (int i = 0; i < all; i++) counters[i].next.store(0, std::memory_order_relaxed);
    Meeting meeting;
#pragma omp parallel num_threads(threads)
    {
        Worker worker{omp_get_thread_num(), omp_get_num_threads(), nullptr};
        double begin = profile && worker.index == 0 ? now() : 0;
        Counter* counter = counters.data();
        for (const Program* program = programs; program < programs + count; program++) {
            const Op* const* ops = program->op;
            for (int i = 0, next; i < program->ops; i = next) {
                const Op& op = *ops[i];
                int height = op.rows < 0 ? -op.rows * program->rows : op.rows;
                worker.next_ = &counter++->next;
                next = i + 1;
                if (entries[op.kind].whole) {
                    entries[op.kind].whole(op, height, worker);
                } else {
                    // What follows on the same rows is done with them at once: nobody waits in between.
                    while (next < program->ops && entries[ops[next]->kind].row && ops[next]->rows == op.rows) next++;
                    int task = std::max(height / (worker.count * 8), 1);
                    for (int first; (first = worker.next() * task) < height;)
                        for (int row = first; row < std::min(first + task, height); row++)
                            for (int k = i; k < next; k++) entries[ops[k]->kind].row(*ops[k], row);
                }
                bool last = next == program->ops && program == programs + count - 1;
                if (!last && worker.count > 1) meeting.meet(worker.count);
                if (profile && worker.index == 0) {
                    double end = now();
                    profile[op.kind] += end - begin;
                    begin = end;
                }
            }
        }
    }
}

}  // extern "C"
