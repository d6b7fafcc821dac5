// All operations for one instruction set; build.py compiles this file once for each, naming it TGI_ISA.
#include "attention.h"
#include "experts.h"
#include "linear.h"
#include "link.h"
#include "rows.h"
#include "sampling.h"
#include "table.h"

using namespace TGI_ISA;

#define NAME_(isa) tgi_table_##isa
#define NAME(isa) NAME_(isa)

template <class O, void (*F)(const O&, int, Worker&)> static void call(const Op& op, int rows, Worker& worker) {
    F(static_cast<const O&>(op), rows, worker);
}
template <class O, void (*F)(const O&, int)> static void each(const Op& op, int row) { F(static_cast<const O&>(op), row); }

extern const Table NAME(TGI_ISA) = {{
    {LINEAR, call<Linear, linear>, nullptr},
    {QUANTIZE, nullptr, each<Quantize, quantize>},
    {NORM, nullptr, each<Norm, norm>},
    {EMBED, nullptr, each<Embed, embed>},
    {ANGLES, nullptr, each<Angles, angles>},
    {TURN, call<Turn, turn>, nullptr},
    {ATTEND, call<Attend, attend>, nullptr},
    {PICK, nullptr, each<Pick, pick>},
    {HEAD, call<Head, head>, nullptr},
    {SAMPLE, call<Sample, sample>, nullptr},
    {ROUTE, nullptr, each<Route, route>},
    {ARRANGE, call<Arrange, arrange>, nullptr},
    {EXPERTS, call<Experts, experts>, nullptr},
    {MIX, nullptr, each<Mix, mix>},
    {EXCHANGE, call<Exchange, exchange>, nullptr},
}};
