"""The digest of a definition, which is the same in every Python version."""

import ast
import hashlib

from ngpt.code.syntax import define, strip_cpp


def test_what_looks_like_a_comment_in_a_text_stays() -> None:
    assert strip_cpp('a = "// no comment";  // a comment\n\n  b;') == 'a = "// no comment";\nb;'


def test_the_text_of_a_tree_does_not_depend_on_the_python_version() -> None:
    """Written by hand: without empty fields, which 3.13 leaves out of `ast.dump`, and without `type_params` of 3.12."""
    tree = ast.parse("def f(x, *, y=None):\n    return -x, 'a', 1.0").body[0]
    arguments = "arguments(args=[arg(arg='x')],kwonlyargs=[arg(arg='y')],kw_defaults=[None])"
    value = "Tuple(elts=[UnaryOp(op=USub(),operand=Name(id='x')),'a',1.0])"
    expected = f"FunctionDef(name='f',args={arguments},body=[Return(value={value})])"
    assert define([tree]).digest == hashlib.sha256(expected.encode()).hexdigest()[:10]


def test_text_counts_the_same_however_it_is_split() -> None:
    """Python 3.12 splits the text of f-strings otherwise than 3.11."""
    parts = ([ast.Constant("a"), ast.Constant("b")], [ast.Constant("ab")])
    one, other = (define([ast.JoinedStr([*part, ast.FormattedValue(ast.Name("x"), -1)])]) for part in parts)
    assert one.digest == other.digest
