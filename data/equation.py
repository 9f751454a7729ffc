"""The value of an arithmetic expression: SVAMP's labels are equations, and two are equal if their values are.

What a model wrote is never given to eval: it is parsed, and only numbers, + - * /, signs and parentheses are computed.
"""

import ast
import math
import operator
import re
import threading

LONGEST = 200  # characters
LARGEST = 1e15  # magnitude of any number or intermediate result; beyond it floats no longer tell integers apart
PARSING = threading.Lock()  # CPython 3.11 counts the depth of all threads' parsing as one: SystemError, now and then
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS |= {ast.UAdd: operator.pos, ast.USub: operator.neg}


def value(text):
    """The value of an arithmetic expression as a float, or None if the text is not one, is too long or too large."""
    if len(text) > LONGEST or not re.fullmatch(r"[0-9.+\-*/()\s]+", text):
        return None
    try:
        with PARSING:
            tree = ast.parse(text.strip(), mode="eval")
        return compute(tree.body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def compute(node):
    match node:
        case ast.Constant(value=int() | float() as result):
            pass
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            result = OPERATORS[type(op)](compute(left), compute(right))
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            result = OPERATORS[type(op)](compute(operand))
        case _:
            raise ValueError("not arithmetic")
    if not abs(result) <= LARGEST:  # also refuses nan
        raise ValueError("too large")
    return float(result)


def same_value(a, b):
    """Whether two texts are equations of the same value: `84 / 2` and `( 84.0 / 2.0 )` are."""
    x, y = value(a), value(b)
    return x is not None and y is not None and math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9)
