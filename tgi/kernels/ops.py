"""The structs of csrc/ops.h, field by field: what Python hands to the library."""

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from enum import IntEnum


class Kind(IntEnum):
    """What an operation does."""

    LINEAR = 0
    QUANTIZE = 1
    NORM = 2
    EMBED = 3
    ANGLES = 4
    TURN = 5
    ATTEND = 6
    PICK = 7
    HEAD = 8
    SAMPLE = 9
    ROUTE = 10
    ARRANGE = 11
    EXPERTS = 12
    MIX = 13
    EXCHANGE = 14


class Form(IntEnum):
    """How panels hold their numbers."""

    FP32 = 0
    BF16 = 1
    INT8 = 2
    INT4 = 3
    E4M3 = 4
    E5M2 = 5
    CODES = 6


class Finish(IntEnum):
    """What happens to a product."""

    STORE = 0
    ADD = 1
    GATE = 2


class Act(IntEnum):
    """Applied to a product, or to its gate."""

    NONE = 0
    SILU = 1
    GELU_TANH = 2
    GELU = 3
    RELU = 4
    RELU2 = 5
    CLIP = 6


class Score(IntEnum):
    """What a router's products become."""

    SOFTMAX = 0
    SIGMOID = 1
    SPARSE_MIXER = 2


class Op(ctypes.Structure):
    """``rows`` of -n: n times as many as its program runs for."""

    _fields_ = [("kind", c_int32), ("rows", c_int32)]


class Program(ctypes.Structure):
    """Operations, one after the other."""

    _fields_ = [("op", c_void_p), ("ops", c_int32), ("rows", c_int32)]


class Linear(Op):
    _fields_ = [
        ("x", c_void_p),
        ("x_scale", c_void_p),
        ("x_sum", c_void_p),
        ("x_stride", c_int64),
        ("sum_stride", c_int64),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("min", c_void_p),
        ("table", c_void_p),
        ("factors", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("form", c_int32),
        ("inner", c_int32),
        ("outs", c_int32),
        ("group", c_int32),
        ("half", c_int32),
        ("zero", c_int32),
        ("finish", c_int32),
        ("act", c_int32),
        ("alpha", c_float),
        ("cap", c_float),
    ]


class Quantize(Op):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("scale", c_void_p),
        ("sum", c_void_p),
        ("sum_stride", c_int64),
        ("size", c_int32),
        ("group", c_int32),
        ("matrices", c_int32),
        ("order", c_void_p),
        ("first", c_void_p),
    ]


class Norm(Op):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("size", c_int32),
        ("parts", c_int32),
        ("center", c_int32),
        ("add", c_int32),
        ("eps", c_float),
    ]


class Embed(Op):
    _fields_ = [
        ("ids", c_void_p),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("min", c_void_p),
        ("table", c_void_p),
        ("factors", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("form", c_int32),
        ("size", c_int32),
        ("group", c_int32),
        ("half", c_int32),
        ("zero", c_int32),
        ("first", c_int32),
        ("count", c_int32),
        ("add", c_int32),
        ("factor", c_float),
    ]


class Choice(ctypes.Structure):
    """How a request's tokens are chosen."""

    _fields_ = [
        ("seed", c_uint64),
        ("green", c_void_p),
        ("history", c_void_p),
        ("counts", c_void_p),
        ("biased", c_void_p),
        ("bias", c_void_p),
        ("barred", c_void_p),
        ("history_size", c_int32),
        ("biased_size", c_int32),
        ("barred_size", c_int32),
        ("greedy", c_int32),
        ("top_k", c_int32),
        ("top_n", c_int32),
        ("delta", c_float),
        ("repetition", c_float),
        ("frequency", c_float),
        ("presence", c_float),
        ("temperature", c_float),
        ("top_p", c_float),
        ("typical_p", c_float),
        ("min_p", c_float),
    ]


class Pick(Op):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("place", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("size", c_int32),
    ]


class Head(Linear):
    _fields_ = [
        ("choices", c_void_p),
        ("most", c_void_p),
        ("mass", c_void_p),
        ("warm", c_void_p),
        ("place", c_void_p),
        ("most_stride", c_int64),
    ]


class Sample(Op):
    _fields_ = [
        ("logits", c_void_p),
        ("stride", c_int64),
        ("head", c_void_p),
        ("choices", c_void_p),
        ("positions", c_void_p),
        ("masks", c_void_p),
        ("known", c_void_p),
        ("ids", c_void_p),
        ("logprobs", c_void_p),
        ("top_ids", c_void_p),
        ("top_logprobs", c_void_p),
        ("most", c_int64),
        ("vocabulary", c_int32),
    ]


class Angles(Op):
    _fields_ = [
        ("positions", c_void_p),
        ("frequencies", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("stride", c_int64),
        ("half", c_int32),
        ("factor", c_float),
    ]


class Step(ctypes.Structure):
    """No operation: what a step's attention layers share."""

    _fields_ = [
        ("segment", c_void_p),
        ("item", c_void_p),
        ("slot", c_void_p),
        ("partial", c_void_p),
        ("done", c_void_p),
        ("segments", c_int32),
        ("items", c_int32),
        ("partials", c_int32),
        ("apart", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("window", c_int32),
    ]


class Paged(Op):
    _fields_ = [
        ("step", c_void_p),
        ("pages", c_void_p),
        ("page", c_int64),
        ("values", c_int64),
        ("form", c_int32),
        ("dim", c_int32),
        ("size", c_int32),
        ("latent", c_int32),
    ]


class Turn(Paged):
    _fields_ = [
        ("qkv", c_void_p),
        ("qkv_stride", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("angle_stride", c_int64),
        ("norm", c_void_p),
        ("half", c_int32),
        ("eps", c_float),
        ("key_scale", c_float),
        ("value_scale", c_float),
    ]


class Attend(Paged):
    _fields_ = [
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("slopes", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class Route(Op):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("bias", c_void_p),
        ("chosen", c_void_p),
        ("weight", c_void_p),
        ("experts", c_int32),
        ("per_token", c_int32),
        ("score", c_int32),
        ("groups", c_int32),
        ("groups_per_token", c_int32),
        ("group_best", c_int32),
        ("jitter", c_float),
        ("norm", c_float),
        ("norm_least", c_float),
        ("factor", c_float),
    ]


class Arrange(Op):
    _fields_ = [
        ("chosen", c_void_p),
        ("first", c_void_p),
        ("place", c_void_p),
        ("row", c_void_p),
        ("experts", c_int32),
        ("per_token", c_int32),
    ]


class Experts(Linear):
    _fields_ = [("first", c_void_p), ("experts", c_int32)]


class Mix(Op):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("place", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("size", c_int32),
        ("per_token", c_int32),
        ("add", c_int32),
        ("factor", c_float),
    ]


class Turns(ctypes.Structure):
    """One thread's."""

    _fields_ = [("value", c_int32), ("left", c_double), ("_rest", c_int32 * 12)]


class Link(ctypes.Structure):
    """No operation: the memory that ranks share."""

    _fields_ = [
        ("memory", c_void_p),
        ("slot", c_int64),
        ("ranks", c_int32),
        ("rank", c_int32),
        ("copied", c_int32),
        ("began", c_double),
        ("patience", c_double),
        ("_rest", c_int32 * 4),
        ("turn", Turns * 256),
    ]


class Exchange(Op):
    _fields_ = [
        ("link", c_void_p),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("first", c_void_p),
        ("size", c_int32),
        ("add", c_int32),
        ("factor", c_float),
    ]


STRUCTS: tuple[type[ctypes.Structure], ...] = (
    *(Linear, Quantize, Norm, Embed, Angles, Turn, Attend, Pick, Head, Sample),
    *(Route, Arrange, Experts, Mix, Exchange),
    *(Choice, Step, Program, Link),
)
"""In the order of the library's own list: operations by Kind, then others."""
