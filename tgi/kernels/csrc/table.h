// The operations of one instruction set, by kind. Each is one of two functions.
#pragma once
#include "ops.h"

struct Entry {
    Kind kind;
    void (*whole)(const Op&, int rows, Worker&);  // takes its tasks by itself
    void (*row)(const Op&, int row);              // for what touches nothing but its row
};
struct Table {
    Entry entries[KINDS];
};
