// The operations of one instruction set, by kind.
#pragma once
#include "ops.h"

using Function = void (*)(const Op&, int rows, Worker&);
struct Entry {
    Kind kind;
    Function function;
};
struct Table {
    Entry entries[KINDS];
};
