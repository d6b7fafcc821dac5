"""The structs of csrc/ops.h, field by field: what Python hands to the library."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
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
    MERGE = 7
    SAMPLE = 8


class Form(IntEnum):
    """How panels hold their numbers."""

    FP32 = 0
    BF16 = 1
    INT8 = 2
    INT4 = 3


class Finish(IntEnum):
    """What happens to a product."""

    STORE = 0
    ADD = 1
    GATE = 2


class Op(ctypes.Structure):
    """``rows`` of -1: as many as the step has."""

    _fields_ = [("kind", c_int32), ("rows", c_int32)]


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
        ("alpha", c_float),
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
    ]


class Norm(Op):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("size", c_int32),
        ("eps", c_float),
    ]


class Embed(Op):
    _fields_ = [
        ("ids", c_void_p),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("min", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("form", c_int32),
        ("size", c_int32),
        ("group", c_int32),
        ("half", c_int32),
        ("zero", c_int32),
        ("factor", c_float),
    ]


STRUCTS: dict[Kind, type[Op]] = {
    Kind.LINEAR: Linear,
    Kind.QUANTIZE: Quantize,
    Kind.NORM: Norm,
    Kind.EMBED: Embed,
}
