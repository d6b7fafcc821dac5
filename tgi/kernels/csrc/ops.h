// What Python hands over: one struct per operation, by address. tgi/kernels/ops.py declares the same structs; their sizes are
// compared when the library is loaded.
#pragma once
#include <atomic>
#include <cstdint>

enum Kind : int32_t { LINEAR, QUANTIZE, NORM, EMBED, ANGLES, TURN, ATTEND, PICK, HEAD, SAMPLE, ROUTE, ARRANGE, EXPERTS, MIX, EXCHANGE, KINDS };

struct Op {
    int32_t kind;
    int32_t rows;  // -n: n times as many as its program runs for
};

// Operations, one after the other.
struct Program {
    const Op* const* op;
    int32_t ops;
    int32_t rows;  // of operations that leave it open
};

// How the panels of a matrix hold their numbers. A panel is 16 outputs; see linear.h for its layout.
enum Form : int32_t { FP32, BF16, INT8, INT4, E4M3, E5M2, CODES };
// What happens to a product.
enum Finish : int32_t {
    STORE,  // out = act(alpha (y + bias)), capped
    ADD,    // out += alpha (y + bias)
    GATE,   // panels alternate between gate and up: out = act(gate) up, half as wide
};
enum Act : int32_t { NONE, SILU, GELU_TANH, GELU, RELU, RELU2, CLIP };

struct Linear : Op {
    const void* x;           // INT8, INT4: int8, quantized in groups; otherwise float32
    const float* x_scale;    // [rows, groups]
    const int32_t* x_sum;    // [rows, groups]: of a group's quantized numbers
    int64_t x_stride;        // numbers from row to row
    int64_t sum_stride;      // of x_scale and x_sum
    const void* weight;      // panels
    const void* scale;       // [panels, groups, 16], float32 or half
    const void* min;         // the same, or null: what is added to each weight
    const float* table;      // [16]: what CODES stand for
    const float* factors;    // [panels, 16]: what the scales of an output of CODES are multiplied by, or null
    const float* bias;       // [panels, 16] or null
    float* out;
    int64_t out_stride;
    int32_t form;
    int32_t in, outs;        // of the matrix: columns, rows
    int32_t group;           // columns that share a scale
    int32_t half;            // whether scales are halves
    int32_t zero;            // what is taken off each stored number
    int32_t finish;
    int32_t act;
    float alpha;
    float cap;               // of capped values: cap tanh(y / cap), or with CLIP the nearest within ± cap; 0: none
};

struct Quantize : Op {
    const float* x;
    int64_t x_stride;
    int8_t* q;
    int64_t q_stride;
    float* scale;    // [rows, size / group]
    int32_t* sum;
    int64_t sum_stride;
    int32_t size, group;    // group: a multiple of 16
    int32_t matrices;       // that have an order and rows of their own
    const int32_t* order;   // [matrices, size]: which number of x each is, or null: they are as in x
    const int32_t* first;   // [matrices + 1]: of each matrix's rows, or null: all are the one's
};

struct Norm : Op {
    const float* x;
    int64_t x_stride;
    const float* weight;
    const float* bias;    // or null
    float* out;
    int64_t out_stride;
    int32_t size;
    int32_t parts;   // of a row, `size` each and each normed by itself; weight and bias: [parts, size]
    int32_t center;  // whether the mean is taken off first
    int32_t add;     // whether out grows by the result
    float eps;
};

struct Embed : Op {
    const int64_t* ids;
    const void* weight;  // as in Linear
    const void* scale;
    const void* min;
    const float* table;
    const float* factors;
    float* out;
    int64_t out_stride;
    int32_t form, size, group, half, zero;
    int32_t first;  // row of the matrix that id 0 stands for
    int32_t count;  // rows that there are; others are zeros
    int32_t add;    // whether out grows by the result
    float factor;
};

// How a request's tokens are chosen. What is null, empty or neutral costs nothing.
struct Choice {
    uint64_t seed;
    const uint8_t* green;     // bit t % 8 of byte t / 8: whether token t gets `delta`
    const int32_t* history;   // distinct tokens of prompt and text
    const float* counts;      // of these: how often they were generated
    const int32_t* biased;
    const float* bias;
    const int32_t* barred;    // tokens that may not come
    int32_t history_size, biased_size, barred_size;
    int32_t greedy, top_k, top_n;
    float delta, repetition, frequency, presence;
    float temperature, top_p, typical_p, min_p;
};

struct Pick : Op {
    const float* x;
    int64_t x_stride;
    const int32_t* place;  // [rows]: rows of x; null: its own
    float* out;
    int64_t out_stride;
    int32_t size;
};

// The product with the vocabulary's matrix, of which nothing is kept but what tells of each bucket of outputs how likely it is.
struct Head : Linear {
    const Choice* const* choices;  // [rows]: greedy, or a draw at some temperature; all else is neutral
    float* most;                   // [buckets, most_stride]: each row's largest logit in the bucket
    float* mass;                   // sum of e^(logit - most)
    float* warm;                   // the same at the row's temperature, if it draws at another than 1
    int32_t* place;                // if it is greedy: the first token with `most`
    int64_t most_stride;
};

// One token for each row of logits, or of a head.
struct Sample : Op {
    const float* logits;
    int64_t stride;                // numbers from row to row
    const Head* head;              // instead of logits
    const Choice* const* choices;  // [rows]
    const int64_t* positions;      // [rows]: of the tokens
    const uint8_t* const* masks;   // [rows], or null: bits as in `green` of the tokens that may come; null: all
    const int64_t* known;          // [rows], or null: the tokens, where there is nothing to choose
    int32_t* ids;                  // [rows]; -1: the row's logits are not numbers; its log-probability is NaN, too
    float* logprobs;               // [rows]: before all changes
    int32_t* top_ids;              // [rows, most]: the likeliest `top_n` of the row, best first
    float* top_logprobs;
    int64_t most;                  // at least the `top_n` of each row, or the vocabulary if that is less
    int32_t vocabulary;
};

struct Angles : Op {
    const int64_t* positions;
    const float* frequencies;  // [half]
    float* cos;
    float* sin;
    int64_t stride;            // of cos and sin
    int32_t half;
    float factor;              // on both
};

// A run of one request's tokens; as many as `start` are in the cache before them.
struct Segment {
    const int32_t* blocks;  // its pages in order
    int32_t start, length;
};

// One task for each kv head: some queries of a segment against their keys, all of them or those of one split.
struct Item {
    const int32_t* blocks;
    int32_t row, position;  // of the first token: on the step's token axis, in its request
    int32_t tokens;
    int32_t first, end;     // splits with keys that the queries see
    int32_t split;          // -1: all of them
    int32_t partial;        // else where the results of the splits go: [kv heads][splits][rows]
    int32_t done;           // and how many there are: [kv heads]
};

// What a step's layers share. Python writes the segments, `plan` the rest.
struct Step {
    Segment* segment;
    Item* item;
    int32_t* slot;           // [tokens]: page times 16, plus the place in it
    float* partial;          // [partials, stride]
    std::atomic<int>* done;  // zeros between the layers
    int32_t segments, items;
    int32_t partials, apart;  // room: for rows of splits, for items of one split
    int32_t heads, kv_heads;
    int32_t window;           // 0: none
};

// Keys and values of a layer; attention.h describes how pages lie.
struct Paged : Op {
    const Step* step;
    char* pages;
    int64_t page;    // bytes of a page of one head
    int64_t values;  // where they begin in it
    int32_t form;    // FP32, BF16, INT8, E4M3 or E5M2
    int32_t dim;     // of a query and a key
    int32_t size;    // of a value
    int32_t latent;  // whether a value is the end of its key
};

struct Turn : Paged {
    float* qkv;           // q is turned in place
    int64_t qkv_stride;
    const float* cos;     // null: nothing turns
    const float* sin;
    int64_t angle_stride;
    const float* norm;    // [heads + kv heads, dim] or null
    int32_t half;         // of the dimensions that turn
    float eps;
    float key_scale, value_scale;  // of E4M3 and E5M2: what is stored is times this
};

struct Attend : Paged {
    const float* q;
    int64_t q_stride;
    const float* slopes;  // [heads]: added to a score for each position that the key comes later, or null
    float* out;
    int64_t out_stride;
    float scale;
    float softcap;  // 0: none
};

enum Score : int32_t { SOFTMAX, SIGMOID, SPARSE_MIXER };

// Which experts each row goes to, and with what weights, as tgi/core/model_config.py describes them (Routing).
struct Route : Op {
    const float* x;     // [rows, experts]: the router's product
    int64_t x_stride;
    const float* bias;  // [experts] or null
    int32_t* chosen;    // [rows, per_token], the best first
    float* weight;      // [rows, per_token]
    int32_t experts, per_token;
    int32_t score;
    int32_t groups, groups_per_token, group_best;
    float jitter, norm, norm_least, factor;
};

// Puts pairs of a row and an expert in the order of experts, those of an expert in the order of rows.
struct Arrange : Op {
    const int32_t* chosen;  // [rows, per_token]
    int32_t* first;         // [experts + 1]: where each expert's begin
    int32_t* place;         // [rows, per_token]: where each pair is
    int32_t* row;           // [rows * per_token]: which row the pair at a place has
    int32_t experts, per_token;
};

// The rows of each expert, which lie side by side, times its matrix; matrices of one size lie one behind the other.
struct Experts : Linear {
    const int32_t* first;  // [experts + 1]: of the rows of each
    int32_t experts;
};

// out[row] += factor * the sum of weight[row][i] * x[place[row][i]], in this order.
struct Mix : Op {
    const float* x;
    int64_t x_stride;
    const int32_t* place;  // [rows, per_token]; null: row
    const float* weight;   // [rows, per_token]
    float* out;
    int64_t out_stride;
    int32_t size, per_token, add;  // add: `out` grows by it
    float factor;
};

// What a thread does that waits for another.
inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    asm volatile("yield");
#endif
}

constexpr int LINK_HEAD = 64;  // bytes of shared memory for each rank's number of arrivals
constexpr int LINK_THREADS = 256;

// What a rank knows of the memory that it shares with the others: heads, then [2][ranks] slots.
struct Link {
    char* memory;
    int64_t slot;              // bytes: a multiple of 64
    int32_t ranks, rank;
    std::atomic<int> copied;   // threads that have put their rows into this rank's slot
    double began;              // when this step was, in seconds of the steady clock
    double patience;           // seconds that others may take longer than three times what this rank took
    struct alignas(64) Turn {
        int32_t value;         // exchanges so far, as each thread counts them
        double left;           // when it came out of the last one
    } turn[LINK_THREADS];
};

// Rows of all ranks are summed, or joined.
struct Exchange : Op {
    Link* link;
    const float* x;
    int64_t x_stride;
    float* out;            // null: this rank doesn't want what comes of it
    int64_t out_stride;
    const int32_t* first;  // null: sums. Else where each rank's columns begin in out, and where the last ones end
    int32_t size;          // of a row of x
    int32_t add;           // whether out grows by the sum times `factor`
    float factor;
};

// One thread's share of an operation: threads take tasks by number until there are none.
struct Worker {
    int index, count;          // this thread among all
    std::atomic<int>* next_;   // tasks given out so far
    int next() { return next_->fetch_add(1, std::memory_order_relaxed); }
};
