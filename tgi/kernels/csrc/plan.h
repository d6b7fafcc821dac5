// What a step of attention consists of: made once per step, before its layers run. The same for all instruction sets.
#pragma once
#include <algorithm>

#include "ops.h"

constexpr int PAGE = 16;    // tokens
constexpr int SPLIT = 256;  // keys that are summed up by themselves: those at positions [SPLIT i, SPLIT (i + 1))
constexpr int ROWS = 96;    // queries that share a task's keys: a row is one head of one token

// Python makes room for them.
static_assert(sizeof(Segment) == 16 && sizeof(Item) == 40 && sizeof(Step) == 72, "see tgi/kernels/attention.py");

// Cuts segments into items, and finds every token's place in the cache. Which splits run apart moves work between
// threads, and no result.
inline void plan(Step& step, int threads) {
    const int shared = step.heads / step.kv_heads, most = std::max(1, ROWS / shared);
    auto first_key = [&](int position) { return step.window ? std::max(0, position - step.window + 1) : 0; };
    auto work = [&](const Segment& segment, int from, int tokens) {
        int position = segment.start + from;
        return (int64_t)tokens * (position + tokens - first_key(position));
    };
    int64_t all = 0;
    for (int i = 0; i < step.segments; i++)
        for (int from = 0; from < step.segment[i].length; from += most)
            all += work(step.segment[i], from, std::min(most, step.segment[i].length - from));

    int row = 0, partial = 0, apart = 0;
    step.items = 0;
    for (int i = 0; i < step.segments; i++) {
        const Segment& segment = step.segment[i];
        for (int from = 0; from < segment.length; from += most) {
            int position = segment.start + from, tokens = std::min(most, segment.length - from);
            int first = first_key(position) / SPLIT, end = (position + tokens - 1) / SPLIT + 1, count = end - first;
            Item item{segment.blocks, row + from, position, tokens, first, end, -1, partial, apart * step.kv_heads};
            int needs = tokens * step.heads * count;
            // Apart where one task would keep a thread busy while the others wait for it.
            bool divide = count > 1 && 4 * threads * work(segment, from, tokens) > all * step.kv_heads && threads > 1;
            if (!divide || partial + needs > step.partials || apart + count > step.apart) {
                step.item[step.items++] = item;
                continue;
            }
            for (item.split = first; item.split < end; item.split++) step.item[step.items++] = item;
            partial += needs;
            apart += count;
        }
        for (int t = 0; t < segment.length; t++) {
            int position = segment.start + t;
            step.slot[row + t] = segment.blocks[position / PAGE] * PAGE + position % PAGE;
        }
        row += segment.length;
    }
}
