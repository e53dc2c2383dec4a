"""Campaign files that are harmful or wrong: the content of each, and what the answer must contain."""

from ngpt.config.yaml_reader import MAX_FILE_BYTES, MAX_NODES

NAME, SWEEP = "campaign: x\n", "vary: {alpha: [0.1, 0.2]}\n"
HEAD = NAME + "seeds: [1]\n"
AXES = ("alpha", "lr", "logit_scale", "weight_decay", "warmup", "softcap")
THOUSANDTHS = ", ".join(f"{i / 1000}" for i in range(1, 101))


def listed(n: int, item: str) -> str:
    return ", ".join(item.replace("N", str(i)) for i in range(n))


def chain(n: int, phase: str) -> str:
    """Phases that each inherit from the one before."""
    lines = [phase.replace("N", str(i)).replace("M", f"inherit: p{i - 1}, " if i else "") for i in range(n)]
    return "phases:\n" + "".join(f"  - {line}\n" for line in lines)


TWO_AXES = "{name: pN, Mvary: {alpha: [0.1, 0.2, 0.3], lr: [1e-3, 2e-3, 3e-3]}}"
BAD_END = "  - {name: bad, inherit: p98, set: {n_head: 7}, vary: {alpha: [0.1]}}\n"
JOINED = "phases:\n" + "".join(f"  - {{name: p{i}, vary: {{alpha: [0.1, 0.2, 0.3]}}}}\n" for i in range(10))
JOINED += "".join(
    f"  - {{name: c{i}, combine: {{from: [{listed(10, 'pN')}{''.join(f', c{j}' for j in range(i))}]}}}}\n"
    for i in range(20)
)
TOO_LARGE = f"too large, at most {MAX_FILE_BYTES} bytes are read"
TOO_MANY = f"more than {MAX_NODES} values"
TOO_DEEP = "nested too deeply, at most 50 levels are read"

# By name: the content, and a part of the answer.
LARGE: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "a campaign is a mapping"),
    "ten_megabytes": ("a: b\n" * 2_000_000, TOO_LARGE),
    "scalar_of_a_megabyte": (f"campaign: {'a' * (1 << 20)}\n", TOO_LARGE),
    "scalar_of_100_kB": (f"campaign: {'a' * 100_000}\n{SWEEP}", "cannot be the name of a campaign"),
    "escapes_of_100_kB": ('description: "' + r"\u0041" * 20_000 + '"\n', "`campaign:` is missing"),
    "integer_of_100000_digits": (f"{HEAD}base: {{steps: {'9' * 100_000}}}\n{SWEEP}", "is too large, a whole number"),
    "hexadecimal_of_100000_digits": (f"{HEAD}base: {{steps: 0x{'f' * 100_000}}}\n{SWEEP}", "is too large, a whole"),
    "seed_of_100000_digits": (f"campaign: x\nseeds: [0o{'7' * 100_000}]\n{SWEEP}", "is too large, a whole number"),
    "float_of_100000_digits": (f"{HEAD}base: {{lr: {'9' * 100_000}.5}}\n{SWEEP}", "should be a finite number, got inf"),
    "version_of_100000_digits": (f"%YAML {'1' * 100_000}.1\n---\nx\n", "not valid YAML: Exceeds the limit"),
    "expression_of_100_kB": (
        f"{HEAD}{SWEEP}claims: [{{id: a, relation: arithmetic, expression: '{'1+' * 50_000}1', value: 1}}]\n",
        "an expression has at most 200 characters",
    ),
    "brackets": ("[" * 100_000, TOO_DEEP),
    "closed_brackets": ("[" * 60_000 + "]" * 60_000, TOO_DEEP),
    "braces": ("{" * 100_000, TOO_DEEP),
    "dashes": ("- " * 50_000, TOO_DEEP),
    "question_marks": ("? " * 50_000, TOO_DEEP),
    "colons": (": " * 50_000, TOO_DEEP),
    "quotes": ("'" * 100_001, "found unexpected end of stream"),
    "tag_of_100_kB": (f"!<{'a' * 100_000}> x\n", "is not supported, only plain data"),
    "tags": ("!" * 100_000, "is not supported, only plain data"),
    "anchor_of_100_kB": (f"&{'a' * 100_000} x\n", "a campaign is a mapping"),
    "alias_of_100_kB": (f"*{'a' * 100_000}\n", "found undefined alias"),
    "tabs": ("\t" * 100_000, "a tab (U+0009): use spaces"),
    "values": (f"[{listed(40_000, '1')}]\n", TOO_MANY),
    "just_as_many_values": (f"[{listed(MAX_NODES - 1, '1')}]\n", "a campaign is a mapping"),
    "aliases": (f"a: &a [1]\nb: [{listed(30_000, '*a')}]\n", TOO_MANY),
    "anchors": (f"campaign: [{listed(9_000, '&aN 1')}]\n", "cannot be the name of a campaign"),
    "unknown_keys": ("".join(f"k{i}: 1\n" for i in range(9_000)), "k0: unknown setting"),
    "unknown_settings": (f"{HEAD}base: {{{listed(8_000, 'kN: 1')}}}\n{SWEEP}", "base.k0: unknown setting"),
    "nearly_settings": (f"{HEAD}base: {{{listed(5_000, 'n_layeN: 1')}}}\n{SWEEP}", "unknown setting, did you mean"),
    "list_of_strings": (f"{HEAD}base: {{alpha: [{listed(19_000, 'a')}]}}\n{SWEEP}", "should be a valid number"),
    "axis_of_strings": (f"{HEAD}vary: {{alpha: [{listed(9_000, 'aN')}]}}\n", "vary.alpha[0]: input should be"),
    "axis_of_equal_values": (f"{HEAD}vary: {{alpha: [{listed(9_000, '0.1')}]}}\n", "0.1 is listed twice"),
    "axis_of_bad_models": (f"{HEAD}vary: {{n_embd: [{listed(9_000, '1N1')}]}}\n", "cannot be divided into"),
    "axis_of_corpora": (f"{HEAD}vary: {{corpus: [{listed(9_000, '/proc/xN')}]}}\n", "unknown corpus"),
    "axes_with_a_bad_pin": (
        f"{HEAD}phases: [{{name: p, set: {{n_head: 7}}, vary: {{alpha: [{listed(9_000, '0.1N1')}]}}}}]\n",
        "phases[0].set.n_head: n_embd 128 cannot be divided",
    ),
    "arms_that_are_the_same": (f"{HEAD}runs: [{listed(6_000, '{arm: aN}')}]\n", "in the same way as 'a0'"),
    "five_thousand_phases": (f"{HEAD}phases: [{listed(5_000, '{}')}]\n", "5000 phases; a campaign has at most 100"),
    "a_chain_of_sweeps": (HEAD + chain(99, TWO_AXES) + BAD_END, "cannot be divided into n_head 7 heads"),
    "joined_phases": (
        f"{HEAD}{JOINED}  - {{name: d, inherit: c19, set: {{n_head: 7}}, vary: {{lr: [1e-3]}}}}\n",
        "cannot be divided into n_head 7 heads",
    ),
    "five_hundred_claims": (
        f"{HEAD}{SWEEP}claims: [{listed(500, '{id: cN, relation: less, left: {alpha: 0.1}, right: {alpha: 0.3}}')}]\n",
        "claims[0].right: no arm of any phase has alpha=0.3",
    ),
    "utf_16": (f"campaign: x\n{SWEEP}".encode("utf-16"), "byte 0 is not UTF-8"),
    "utf_16_of_the_other_end": (b"\xfe\xff" + "campaign: x\n".encode("utf-16-be"), "byte 0 is not UTF-8"),
    "utf_32": ("campaign: x\n".encode("utf-32"), "byte 0 is not UTF-8"),
    "two_byte_order_marks": ("\ufeff\ufeffcampaign: x\n", r"1:1: \ufeffcampaign: unknown setting"),
    "a_program": (b"\x7fELF\x02\x01\x01" + bytes(57), "unacceptable character #x007f"),
    "an_archive": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "byte 1 is not UTF-8"),
    "a_pickle": (b"\x80\x04\x95\x1f\x00\x00\x00cposix\nsystem\n(S'touch pwned'\ntR.", "byte 0 is not UTF-8"),
}

NO_MAPPING = "a campaign is a mapping with at least `campaign:` and `phases:` (or `vary:`)"
PLAIN_DATA = " is not supported, only plain data"
CAMPAIGN_NAME, PHASE_NAME, CLAIM_NAME = (
    f" cannot be the name of a {noun}: use 1 to 64 letters, digits, " for noun in ("campaign", "phase", "claim")
)
ARM_NAME = " cannot be the name of an arm: use 1 to 80 letters, digits, "
NO_VALUE = " is not an arithmetic expression: use numbers, + - * / ** and parentheses, such as `11"
TOO_LONG = "an expression has at most 200 characters, got "
TOO_LARGE_NUMBER = " is too large, a whole number is at most 9223372036854775807"
NO_SETTINGS = " must be a mapping of settings or the path of a .yaml file, got "


def base(text: str) -> str:
    """A campaign with these lines as its base."""
    return NAME + f"base: {text}\n" + SWEEP


def phases(text: str) -> str:
    """A campaign with these phases."""
    return NAME + f"phases: [{text}]\n"


def arithmetic_claim(expression: str) -> str:
    """A campaign with a claim about an expression."""
    claim = f"{{id: a, relation: arithmetic, expression: {expression}, value: 1, tolerance: 0}}"
    return NAME + SWEEP + f"claims: [{claim}]\n"


# By file name without `.yaml`: the content, and how the answer begins after the path.
SMALL: dict[str, tuple[str | bytes, str]] = {
    "alias_as_key": ("&a campaign: x\n*a : y\n" + SWEEP, "1:1: duplicate key 'campaign'"),
    "alias_bomb": (
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            "a1: &a1 [*a0, *a0, *a0, *a0, *a0, *a0, *a0, *a0, *a0, *a0]\n"
            "a2: &a2 [*a1, *a1, *a1, *a1, *a1, *a1, *a1, *a1, *a1, *a1]\n"
            "a3: &a3 [*a2, *a2, *a2, *a2, *a2, *a2, *a2, *a2, *a2, *a2]\n"
            "a4: &a4 [*a3, *a3, *a3, *a3, *a3, *a3, *a3, *a3, *a3, *a3]\n"
            "a5: &a5 [*a4, *a4, *a4, *a4, *a4, *a4, *a4, *a4, *a4, *a4]\n"
            "a6: &a6 [*a5, *a5, *a5, *a5, *a5, *a5, *a5, *a5, *a5, *a5]\n"
            "a7: &a7 [*a6, *a6, *a6, *a6, *a6, *a6, *a6, *a6, *a6, *a6]\n"
            "a8: &a8 [*a7, *a7, *a7, *a7, *a7, *a7, *a7, *a7, *a7, *a7]\n"
            "a9: &a9 [*a8, *a8, *a8, *a8, *a8, *a8, *a8, *a8, *a8, *a8]\n"
        ),
        "1:37: more than 20000 values",
    ),
    "alias_bomb_in_the_grid": (
        NAME
        + (
            "phases:\n"
            "  - name: p\n"
            "    grid:\n"
            "      alpha: &a [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n"
            "      lr: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
            "      steps: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\n"
            "      batch_size: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
            "      logit_scale: [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]\n"
        ),
        "5:30: more than 20000 values",
    ),
    "alias_bomb_of_mappings": (
        (
            "a: &a {k: v}\n"
            "b: &b {k0: *a, k1: *a, k2: *a, k3: *a, k4: *a, k5: *a, k6: *a, k7: *a, k8: *a, k9: *a}\n"
            "c: &c {k0: *b, k1: *b, k2: *b, k3: *b, k4: *b, k5: *b, k6: *b, k7: *b, k8: *b, k9: *b}\n"
            "d: &d {k0: *c, k1: *c, k2: *c, k3: *c, k4: *c, k5: *c, k6: *c, k7: *c, k8: *c, k9: *c}\n"
            "e: &e {k0: *d, k1: *d, k2: *d, k3: *d, k4: *d, k5: *d, k6: *d, k7: *d, k8: *d, k9: *d}\n"
            "f: &f {k0: *e, k1: *e, k2: *e, k3: *e, k4: *e, k5: *e, k6: *e, k7: *e, k8: *e, k9: *e}\n"
            "g: &g {k0: *f, k1: *f, k2: *f, k3: *f, k4: *f, k5: *f, k6: *f, k7: *f, k8: *f, k9: *f}\n"
            "h: &h {k0: *g, k1: *g, k2: *g, k3: *g, k4: *g, k5: *g, k6: *g, k7: *g, k8: *g, k9: *g}\n"
            "i: &i {k0: *h, k1: *h, k2: *h, k3: *h, k4: *h, k5: *h, k6: *h, k7: *h, k8: *h, k9: *h}\n"
            "j: &j {k0: *i, k1: *i, k2: *i, k3: *i, k4: *i, k5: *i, k6: *i, k7: *i, k8: *i, k9: *i}\n"
        ),
        "1:11: more than 20000 values",
    ),
    "all_null": (
        "campaign:\nmetric:\nhold:\nseeds:\nbase:\nphases:\nclaims:\n",
        "1:1: campaign: None" + CAMPAIGN_NAME,
    ),
    "anchor_only": ("&a\n", "1:1: " + NO_MAPPING),
    "arm_formula": (phases("{name: p, runs: [{arm: '=1+1'}]}"), "2:28: phases[0].runs[0].arm: '=1+1'" + ARM_NAME),
    "arm_html": (
        phases("{name: p, runs: [{arm: '<img src=x onerror=alert(1)>'}]}"),
        "2:28: phases[0].runs[0].arm: '<img src=x onerror=alert(1)>'" + ARM_NAME,
    ),
    "arm_list": (phases("{name: p, runs: [{arm: [a]}]}"), "2:28: phases[0].runs[0].arm: ['a']" + ARM_NAME),
    "arm_pipe": (phases("{name: p, runs: [{arm: 'a|b'}]}"), "2:28: phases[0].runs[0].arm: 'a|b'" + ARM_NAME),
    "axis_of_lists_of_lists": (
        NAME + "vary: {alpha: [[[[1]]], [[[2]]]]}\n",
        "2:16: vary.alpha[0]: tuple should have at least 1 item after validation, not 0, got [[[1]]]",
    ),
    "axis_of_mappings": (
        NAME + "vary: {alpha: [{a: 1}, {b: 2}]}\n",
        "2:16: vary.alpha[0]: input should be a valid number, got {'a': 1}",
    ),
    "bad_indent": (NAME + " base: {steps: 3}\n" + SWEEP, "2:6: not valid YAML: mapping values are not allowed here"),
    "betas_of_three": (
        base("{optim: {betas: [0.9, 0.9, 0.9]}}"),
        "2:16: base.optim.betas: tuple should have at most 2 items after validation, not 3, got [0.9, 0.9, 0.9]",
    ),
    "beyond_unicode": ('campaign: "\\UFFFFFFFF"\n' + SWEEP, "not valid YAML: Python int too large to convert to C int"),
    "block_scalar_bad_header": (
        "campaign: |99\n  x\n" + SWEEP,
        "1:13: not valid YAML: expected chomping or indentation indicators, but found '9'",
    ),
    "bom_in_the_middle": (
        NAME + "\ufeffbase: {steps: 3}\n" + SWEEP,
        "2:1: \\ufeffbase: unknown setting, did you mean 'base'?",
    ),
    "boolean_for_a_number": (
        base("{steps: true, batch_size: false}"),
        "2:8: base.steps: input should be a valid integer, got True",
    ),
    "c1_control": ('campaign: "\\x9b31mx"\n' + SWEEP, "1:11: the character U+009B is not allowed"),
    "carriage_returns": (
        "campaign: x\rbase: {stepz: 3}\r" + SWEEP,
        "2:8: base.stepz: unknown setting, did you mean 'steps'?",
    ),
    "claim_about_itself": (
        NAME + SWEEP + "claims: [{id: a, relation: less, left: {alpha: 0.1}, right: {alpha: 0.1}}]\n",
        "3:54: claims[0].right: left and right are the same",
    ),
    "claim_arm_is_a_list": (
        NAME + SWEEP + "claims: [{id: a, relation: less, left: {arm: [a]}, right: {alpha: 0.1}}]\n",
        "3:41: claims[0].left.arm: expected the name of an arm, got ['a']",
    ),
    "claim_call": (
        arithmetic_claim("\"__import__('os').system('touch pwned')\""),
        "3:40: claims[0].expression: \"__import__('os').system('touch pwned')\"" + NO_VALUE,
    ),
    "claim_comprehension": (
        arithmetic_claim("'sum([1 for _ in range(10**12)])'"),
        "3:40: claims[0].expression: 'sum([1 for _ in range(10**12)])'" + NO_VALUE,
    ),
    "claim_digits": (arithmetic_claim("'" + "9" * 5000 + "'"), "3:40: claims[0].expression: " + TOO_LONG + "5000"),
    "claim_digits_190": (arithmetic_claim("'" + "9" * 190 + "**2'"), "3:40: claims[0].expression: '" + "9" * 101),
    "claim_division_by_zero": (arithmetic_claim("1/0"), "3:40: claims[0].expression: '1/0' has no finite value"),
    "claim_hex_of_5000_digits": (
        arithmetic_claim("0x" + "f" * 5000),
        "3:52: 0xffffffffffffffffff\u2026ffffffffffffffffffff" + TOO_LARGE_NUMBER,
    ),
    "claim_id_up": (
        NAME + SWEEP + "claims: [{id: ../x, relation: less, left: {alpha: 0.1}, right: {alpha: 0.2}}]\n",
        "3:11: claims[0].id: '../x'" + CLAIM_NAME,
    ),
    "claim_imaginary": (arithmetic_claim("1j"), "3:40: claims[0].expression: '1j'" + NO_VALUE),
    "claim_lambda": (
        arithmetic_claim("'(lambda: 1)()'"),
        "3:40: claims[0].expression: '(lambda: 1)()'" + NO_VALUE,
    ),
    "claim_minuses": (arithmetic_claim("'" + "-" * 5000 + "1'"), "3:40: claims[0].expression: " + TOO_LONG + "5001"),
    "claim_nan_tolerance": (
        NAME + SWEEP + "claims: [{id: a, relation: arithmetic, expression: '1', value: 1, tolerance: .nan}]\n",
        "3:67: claims[0].tolerance: nan has no finite value",
    ),
    "claim_nul": (arithmetic_claim('"1\\0"'), "3:52: the character U+0000 is not allowed"),
    "claim_of_nothing": (
        NAME + SWEEP + "claims: [{}, ~, 3, [a], less]\n",
        "3:10: claims[0]: `id:` is missing: give the claim a name",
    ),
    "claim_parentheses": (arithmetic_claim("'" + "(" * 5000 + "'"), "3:40: claims[0].expression: " + TOO_LONG + "5000"),
    "claim_root_of_minus_one": (
        arithmetic_claim("'(-1)**0.5'"),
        "3:40: claims[0].expression: '(-1)**0.5'" + NO_VALUE,
    ),
    "claim_shift": (arithmetic_claim("'1 << 10**12'"), "3:40: claims[0].expression: '1 << 10**12'" + NO_VALUE),
    "claim_string_times": (
        arithmetic_claim("\"'x' * 10**12\""),
        "3:40: claims[0].expression: \"'x' * 10**12\"" + NO_VALUE,
    ),
    "claim_tower": (arithmetic_claim("9**9**9"), "3:40: claims[0].expression: '9**9**9' has no finite value"),
    "claim_tower_of_integers": (
        arithmetic_claim("'(10**10)**(10**10)'"),
        "3:40: claims[0].expression: '(10**10)**(10**10)' has no finite value",
    ),
    "combine_itself": (
        phases("{name: a, combine: {from: [a]}}"),
        "2:37: phases[0].combine.from[0]: phases inherit from each other in a cycle: a -> a",
    ),
    "confidence_above_one": (
        NAME + "confidence: 1.5\n" + SWEEP,
        "2:1: confidence: input should be less than 1, got 1.5",
    ),
    "corpus_empty": (
        base("{data: {corpus: ''}}"),
        "2:15: base.data.corpus: a corpus is a name, a file or a folder, got ''",
    ),
    "corpus_list": (
        base("{data: {corpus: [a, b]}}"),
        "2:15: base.data.corpus: input should be a valid string, got ['a', 'b']",
    ),
    "corpus_long": (
        base("{data: {corpus: " + "a" * 5000 + "}}"),
        "2:15: base.data.corpus: [Errno 36] File name too long: '" + "a" * 74,
    ),
    "corpus_nul": (base('{data: {corpus: "a\\0b"}}'), "2:23: the character U+0000 is not allowed"),
    "corpus_up": (
        base("{data: {corpus: ../../../../../nowhere}}"),
        "2:15: base.data.corpus: unknown corpus '../../../../../nowhere'",
    ),
    "corpus_url": (
        base("{data: {corpus: 'file:///etc/passwd'}}"),
        "2:15: base.data.corpus: unknown corpus 'file:///etc/passwd'",
    ),
    "corpus_zero": (
        base("{data: {corpus: /dev/zero}}"),
        "2:15: base.data.corpus: /dev/zero is neither a file nor a folder",
    ),
    "date_for_a_number": (
        base("{steps: 2026-11-21}"),
        "2:8: base.steps: input should be a valid integer, got '2026-11-21'",
    ),
    "deep_blocks": (
        NAME + "base:\n" + "".join(f"{' ' * i}a:\n" for i in range(1, 121)),
        "52:51: nested too deeply, at most 50 levels are read",
    ),
    "deep_flow": (NAME + "base: " + "[" * 400 + "\n", "2:57: nested too deeply, at most 50 levels are read"),
    "deep_keys": ("? " * 2000 + "a\n", "1:103: nested too deeply, at most 50 levels are read"),
    "deep_mappings": (
        NAME + "base" + ": {a" * 1000 + ": 1" + "}" * 1000 + "\n",
        "2:204: nested too deeply, at most 50 levels are read",
    ),
    "deep_sequences": (NAME + "base:\n" + " -" * 3000 + " 1\n", "3:102: nested too deeply, at most 50 levels are read"),
    "description_with_nul": (NAME + 'description: "a\\0b"\n' + SWEEP, "2:14: the character U+0000 is not allowed"),
    "duplicate_key_nested": (base("{model: {n_layer: 2, n_layer: 4}}"), "2:28: duplicate key 'n_layer'"),
    "duplicate_key_top": (NAME + "campaign: y\n" + SWEEP, "2:1: duplicate key 'campaign'"),
    "duplicate_setting_two_spellings": (
        base("{lr: 1e-3, optim: {lr: 2e-3}}"),
        "2:26: base.optim.lr: optim.lr is given twice",
    ),
    "duplicate_vary_two_spellings": (
        NAME + "vary: {alpha: [0.1], model.alpha: [0.2]}\n",
        "2:22: vary.model.alpha: model.alpha is given twice",
    ),
    "empty_axis": (NAME + "vary: {alpha: []}\n", "2:8: vary.alpha: the list of values is empty"),
    "enormous_batch": (base("{batch_size: 1000000000000000000000}"), "2:20: 1000000000000000000000" + TOO_LARGE_NUMBER),
    "escape_sequence_escaped": ('campaign: "\\e[2Jx"\n' + SWEEP, "1:11: the character U+001B is not allowed"),
    "everything_wrong": (
        (
            "campaign: [1]\n"
            "description: 3\n"
            "metric: val_loss\n"
            "hold: breath\n"
            "confidence: high\n"
            "min_effect: -1\n"
            "resources: 3\n"
            "budget: [1]\n"
            "noise: 0\n"
            "seeds: 3\n"
            "base: 3\n"
            "phases: 3\n"
            "claims: 3\n"
        ),
        "1:1: campaign: [1]" + CAMPAIGN_NAME,
    ),
    "fraction_of_a_step": (base("{steps: 2.5}"), "2:8: base.steps: input should be a valid integer, got 2.5"),
    "hex_of_5000_digits": (
        base("{steps: 0x" + "f" * 5000 + "}"),
        "2:15: 0xffffffffffffffffff\u2026ffffffffffffffffffff" + TOO_LARGE_NUMBER,
    ),
    "huge_integer_of_steps": (
        base("{steps: 1" + "0" * 100 + "}"),
        "2:15: 10000000000000000000\u202600000000000000000000" + TOO_LARGE_NUMBER,
    ),
    "impossible_heads": (
        base("{model: {n_head: 7, n_embd: 64}}"),
        "2:16: base.model.n_head: n_embd 64 cannot be divided into n_head 7 heads",
    ),
    "include_device": (base("{model: /dev/zero}"), "2:8: base.model:" + NO_SETTINGS + "'/dev/zero'"),
    "include_home_of_nobody": (
        base("{model: ~nosuchuser/x.yaml}"),
        "2:8: base.model: ~nosuchuser/x.yaml: No such file or directory",
    ),
    "include_in_claim": (
        NAME + SWEEP + "claims: [{id: a, relation: less, left: {model: /dev/zero}, right: {alpha: 0.1}}]\n",
        "3:41: claims[0].left.model:" + NO_SETTINGS + "'/dev/zero'",
    ),
    "include_in_vary": (NAME + "vary: {model: /dev/zero}\n", "2:8: vary.model:" + NO_SETTINGS + "'/dev/zero'"),
    "include_itself": (
        base("{model: include_itself.yaml}"),
        "2:8: base.model: include_itself.yaml:1:1: campaign: unknown setting, did you mean 'alpha_sign'?",
    ),
    "include_missing": (
        base("{model: ../../../nowhere.yaml}"),
        "2:8: base.model: ../../../nowhere.yaml: No such file or directory",
    ),
    "include_nested": (base("{model: {model: /dev/zero}}"), "2:16: base.model.model: unknown setting"),
    "include_of_no_file": (base("{optim: muon}"), "2:8: base.optim:" + NO_SETTINGS + "'muon'"),
    "include_password_file": (
        base("{model: ../../../../../etc/passwd}"),
        "2:8: base.model:" + NO_SETTINGS + "'../../../../../etc/passwd'",
    ),
    "include_url": (
        base("{model: 'http://127.0.0.1:1/x.yaml'}"),
        "2:8: base.model: http:/127.0.0.1:1/x.yaml: No such file or directory",
    ),
    "infinity": (base("{optim: {lr: .inf}}"), "2:16: base.optim.lr: input should be a finite number, got inf"),
    "inherit_etc": (
        phases("{name: a, inherit: /etc/passwd, vary: {alpha: [0.1]}}"),
        "2:20: phases[0].inherit: '/etc' is not a results directory: it has no journal.jsonl with a campaign in it",
    ),
    "inherit_long": (
        phases("{name: a, inherit: r/" + "a" * 5000 + "/p, vary: {alpha: [0.1]}}"),
        "2:20: phases[0].inherit: there is no results directory 'r/" + "a" * 72,
    ),
    "inherit_mapping": (
        phases("{name: a, inherit: {b: c}, vary: {alpha: [0.1]}}"),
        "2:20: phases[0].inherit: unknown phase \"{'b': 'c'}\"",
    ),
    "inherit_newline": (
        phases('{name: a, inherit: "r/a\\nb/p", vary: {alpha: [0.1]}}'),
        "2:20: phases[0].inherit: there is no results directory 'r/a\\nb'",
    ),
    "inherit_slash": (
        phases("{name: a, inherit: /, vary: {alpha: [0.1]}}"),
        "2:20: phases[0].inherit: '/' is not a results directory: it has no journal.jsonl with a campaign in it",
    ),
    "inherit_up": (
        phases("{name: a, inherit: ../../nowhere/x, vary: {alpha: [0.1]}}"),
        "2:20: phases[0].inherit: there is no results directory '../../nowhere'",
    ),
    "inherit_user": (
        phases("{name: a, inherit: ~nosuchuser/x/y, vary: {alpha: [0.1]}}"),
        "2:20: phases[0].inherit: there is no results directory '~nosuchuser/x'",
    ),
    "integer_of_4000_digits": (
        base("{steps: " + "9" * 4000 + "}"),
        "2:15: 99999999999999999999\u202699999999999999999999" + TOO_LARGE_NUMBER,
    ),
    "integer_of_5000_digits": (
        base("{steps: " + "9" * 5000 + "}"),
        "2:15: 99999999999999999999\u202699999999999999999999" + TOO_LARGE_NUMBER,
    ),
    "invalid_utf8": (b"campaign: \xff\xfe\nvary: {alpha: [0.1, 0.2]}\n", "byte"),
    "json": (
        '{"campaign": "x", "vary": {"alpha": [0.1, "0.2"]}}\n',
        "1:43: vary.alpha[1]: input should be a valid number, got '0.2'",
    ),
    "key_bidi": (NAME + 'base: {"\u202espets": 3}\n' + SWEEP, "2:8: the character U+202E is not allowed"),
    "key_confusable": (
        NAME + "base: {\u0430lpha: 0.2}\n" + SWEEP,
        ("2:8: base.\u0430lpha: unknown setting, did you mean 'alpha'? (it contains CYRILLIC SMALL LETTER A, U+0430)"),
    ),
    "key_confusable_top": (
        "\u0441ampaign: x\n" + SWEEP,
        "1:1: \u0441ampaign: unknown setting, did you mean 'campaign'?",
    ),
    "key_dunder": (base("{__class__: 3, model.__init__.__globals__: 4}"), "2:8: base.__class__: unknown setting"),
    "key_escape": (base('{"\\x1b[31msteps": 3}'), "2:8: the character U+001B is not allowed"),
    "key_fullwidth": (
        NAME + "base: {\uff53teps: 3}\n" + SWEEP,
        (
            "2:8: base.\uff53teps: unknown setting, did you mean 'steps'? (it contains FULLWIDTH LATIN SMALL "
            "LETTER S, U+FF53)"
        ),
    ),
    "key_is_a_list": (NAME + "? [a, b]\n: 1\n", "2:3: a key must be a word"),
    "key_is_empty": (NAME + ": 1\n" + SWEEP, "2:1: a key must be a word"),
    "key_is_null": (base("{~: 1}"), "2:8: base.~: unknown setting"),
    "key_zero_width": (
        NAME + "base: {ste\u200bps: 3}\n" + SWEEP,
        "2:8: base.ste\\u200bps: unknown setting, did you mean 'steps'? (it contains ZERO WIDTH SPACE, U+200B)",
    ),
    "line_separator": (
        "campaign: x\u2028base: {steps: 3}\n" + SWEEP,
        "1:17: not valid YAML: mapping values are not allowed here",
    ),
    "list_at_top": ("- campaign: x\n", "1:1: " + NO_MAPPING),
    "list_for_a_number": (base("{steps: [3]}"), "2:8: base.steps: input should be a valid integer, got [3]"),
    "lone_surrogate": ('campaign: "\\ud800"\n' + SWEEP, "1:11: the character U+D800 is not allowed"),
    "mapping_for_a_number": (base("{steps: {a: 3}}"), "2:8: base.steps: input should be a valid integer, got {'a': 3}"),
    "merge_key": (
        NAME + "defaults: &d {steps: 3}\nbase: {<<: *d}\n" + SWEEP,
        "3:8: YAML 1.2 has no merge key '<<', write the settings out",
    ),
    "minus_infinity_swept": (
        NAME + "vary: {alpha: [-.inf, 0.1]}\n",
        "2:16: vary.alpha[0]: input should be a finite number, got -inf",
    ),
    "mojibake": ("campaign: gr\u221a\xbaner\n" + SWEEP, "1:1: campaign: 'gr\u221a\xbaner'" + CAMPAIGN_NAME),
    "name_absolute": ("campaign: /etc/passwd\n" + SWEEP, "1:1: campaign: '/etc/passwd'" + CAMPAIGN_NAME),
    "name_confusable": ("campaign: p\u0430ypal\n" + SWEEP, "1:1: campaign: 'p\u0430ypal'" + CAMPAIGN_NAME),
    "name_dots": ("campaign: ..\n" + SWEEP, "1:1: campaign: '..'" + CAMPAIGN_NAME),
    "name_empty": ("campaign: ''\n" + SWEEP, "1:1: campaign: ''" + CAMPAIGN_NAME),
    "name_formula": ("campaign: '=cmd|calc!A1'\n" + SWEEP, "1:1: campaign: '=cmd|calc!A1'" + CAMPAIGN_NAME),
    "name_hidden": ("campaign: .ssh\n" + SWEEP, "1:1: campaign: '.ssh'" + CAMPAIGN_NAME),
    "name_html": (
        "campaign: <script>alert(1)</script>\n" + SWEEP,
        "1:1: campaign: '<script>alert(1)</script>'" + CAMPAIGN_NAME,
    ),
    "name_ledger": (
        "campaign: seeds.jsonl\n" + SWEEP,
        "1:1: campaign: 'seeds.jsonl' is reserved: the folder of the results uses this name itself",
    ),
    "name_long": (
        "campaign: " + "a" * 300 + "\n" + SWEEP,
        "1:1: campaign: 'aaaaaaaaaaaaaaaaaaa\u2026aaaaaaaaaaaaaaaaaaaa'" + CAMPAIGN_NAME,
    ),
    "name_newline": ('campaign: "a\\nb"\n' + SWEEP, "1:1: campaign: 'a\\nb'" + CAMPAIGN_NAME),
    "name_number": ("campaign: 3\n" + SWEEP, "1:1: campaign: 3 cannot be the name of a campaign: put it in quotes"),
    "name_option": ("campaign: --out\n" + SWEEP, "1:1: campaign: '--out'" + CAMPAIGN_NAME),
    "name_slash": ("campaign: a/b\n" + SWEEP, "1:1: campaign: 'a/b'" + CAMPAIGN_NAME),
    "name_trailing_newline": ('campaign: "a\\n"\n' + SWEEP, "1:1: campaign: 'a\\n'" + CAMPAIGN_NAME),
    "name_up": ("campaign: ../../etc\n" + SWEEP, "1:1: campaign: '../../etc'" + CAMPAIGN_NAME),
    "nan": (base("{optim: {lr: .nan}}"), "2:16: base.optim.lr: input should be a finite number, got nan"),
    "nan_swept_twice": (
        NAME + "vary: {alpha: [.nan, .nan]}\n",
        "2:16: vary.alpha[0]: input should be a finite number, got nan",
    ),
    "negative_layers": (
        base("{model: {n_layer: -3}}"),
        "2:16: base.model.n_layer: input should be greater than or equal to 1, got -3",
    ),
    "negative_steps": (base("{steps: -1}"), "2:8: base.steps: input should be greater than or equal to 1, got -1"),
    "next_line": (
        "campaign: x\x85base: {stepz: 3}\n" + SWEEP,
        "1:17: not valid YAML: mapping values are not allowed here",
    ),
    "nul_escaped": ('campaign: "x\\0y"\n' + SWEEP, "1:11: the character U+0000 is not allowed"),
    "null_document": ("~\n", "1:1: " + NO_MAPPING),
    "null_for_a_number": (base("{steps: ~}"), "2:8: base.steps: input should be a valid integer, got None"),
    "number_at_top": ("42\n", "1:1: " + NO_MAPPING),
    "number_for_a_boolean": (
        base("{model: {tied: 1}}"),
        "2:16: base.model.tied: input should be a valid boolean, got 1",
    ),
    "octal_surprise": (base("{steps: 0o9}"), "2:8: base.steps: input should be a valid integer, got '0o9'"),
    "only_a_comment": ("# nothing\n", "1:1: " + NO_MAPPING),
    "overflowing_float": (
        base("{optim: {lr: 1e999}}"),
        "2:16: base.optim.lr: input should be a finite number, got inf",
    ),
    "overlong_utf8": (b"campaign: \xc0\xaf\nvary: {alpha: [0.1, 0.2]}\n", "byte"),
    "path_nul": (base('{data: {path: "a\\0b"}}'), "2:21: the character U+0000 is not allowed"),
    "phase_escape": (
        phases('{name: "\\e]0;pwned\\a", vary: {alpha: [0.1]}}'),
        "2:17: the character U+001B is not allowed",
    ),
    "phase_inherits_itself": (
        phases("{name: a, inherit: a, vary: {alpha: [0.1]}}"),
        "2:20: phases[0].inherit: phases inherit from each other in a cycle: a -> a",
    ),
    "phase_journal": (
        phases("{name: journal.jsonl, vary: {alpha: [0.1]}}"),
        "2:11: phases[0].name: 'journal.jsonl' is reserved: the results directory uses this name itself",
    ),
    "phase_derived": (
        phases("{name: Derived.json, vary: {alpha: [0.1]}}"),
        "2:11: phases[0].name: 'Derived.json' is reserved: the results directory uses this name itself",
    ),
    "phase_discarded": (
        phases("{name: discarded, vary: {alpha: [0.1]}}"),
        "2:11: phases[0].name: 'discarded' is reserved: the results directory uses this name itself",
    ),
    "phase_lock": (
        phases("{name: campaign.lock, vary: {alpha: [0.1]}}"),
        "2:11: phases[0].name: 'campaign.lock' is reserved: the results directory uses this name itself",
    ),
    "phase_slash": (
        phases("{name: ../trials, vary: {alpha: [0.1]}}"),
        "2:11: phases[0].name: '../trials'" + PHASE_NAME,
    ),
    "phase_trials": (
        phases("{name: trials, vary: {alpha: [0.1]}}"),
        "2:11: phases[0].name: 'trials' is reserved: the results directory uses this name itself",
    ),
    "phase_twice": (
        phases("{name: p, vary: {alpha: [0.1]}}, {name: p, vary: {alpha: [0.2]}}"),
        "2:44: phases[1].name: two phases are named 'p'",
    ),
    "phase_twice_but_for_case": (
        phases("{name: p, vary: {alpha: [0.1]}}, {name: P, vary: {alpha: [0.2]}}"),
        "2:44: phases[1].name: two phases are named 'P'",
    ),
    "phase_up": (phases("{name: .., vary: {alpha: [0.1]}}"), "2:11: phases[0].name: '..'" + PHASE_NAME),
    "phases_inherit_in_a_cycle": (
        NAME
        + (
            "phases:\n"
            "  - {name: a, inherit: b, vary: {alpha: [0.1]}}\n"
            "  - {name: b, inherit: a, vary: {alpha: [0.2]}}\n"
        ),
        "3:15: phases[0].inherit: phases inherit from each other in a cycle: a -> b -> a",
    ),
    "product_of_10_to_12_arms": (
        NAME + "phases:\n  - name: p\n    grid:\n" + "".join(f"      {axis}: [{THOUSANDTHS}]\n" for axis in AXES),
        (
            "4:5: phases[0].grid: (100 x 100 x 100 x 100 x 100) arms x 3 seeds = 3e+10 trials; a "
            "campaign has at most 10000"
        ),
    ),
    "python": ("import os\nos.system('touch pwned')\n", "1:1: " + NO_MAPPING),
    "recursive_alias": (base("&b {model: *b}"), "2:7: nested too deeply, at most 50 levels are read"),
    "recursive_list": (NAME + "phases: &p [*p, *p]\n", "2:9: nested too deeply, at most 50 levels are read"),
    "scalar_at_top": ("campaign\n", "1:1: " + NO_MAPPING),
    "scalar_axis": (NAME + "vary: {alpha: 0.1}\n", "2:8: vary.alpha: expected a list of values, got 0.1"),
    "search_bounds_1e300": (
        NAME + "search: {trials: 3, space: {lr: {uniform: [-1e300, 1e300]}}}\n",
        "2:29: search.space.lr: input should be greater than or equal to 0, got -5.328e+299",
    ),
    "search_bounds_huge_integers": (
        NAME + "search: {trials: 3, space: {steps: {uniform: [1, " + "9" * 4000 + "]}}}\n",
        "2:50: 99999999999999999999\u202699999999999999999999" + TOO_LARGE_NUMBER,
    ),
    "search_bounds_infinite": (
        NAME + "search: {trials: 3, space: {lr: {log: [1e-3, .inf]}}}\n",
        "2:34: search.space.lr.log: the low end must be below the high end, got [0.001, inf]",
    ),
    "search_bounds_nan": (
        NAME + "search: {trials: 3, space: {lr: {uniform: [.nan, .nan]}}}\n",
        "2:34: search.space.lr.uniform: the low end must be below the high end, got [nan, nan]",
    ),
    "search_bounds_reversed": (
        NAME + "search: {trials: 3, space: {alpha: {uniform: [0.5, 0.1]}}}\n",
        "2:37: search.space.alpha.uniform: the low end must be below the high end, got [0.5, 0.1]",
    ),
    "search_choice_of_mappings": (
        NAME + "search: {trials: 3, space: {lr: {choice: [{a: 1}]}}}\n",
        "2:43: search.space.lr.choice[0]: a choice cannot be a mapping, got {'a': 1}",
    ),
    "search_log_of_zero": (
        NAME + "search: {trials: 3, space: {lr: {log: [0, 1]}}}\n",
        "2:34: search.space.lr.log: a logarithmic interval must lie above 0, got [0, 1]",
    ),
    "search_negative": (
        NAME + "search: {trials: -3, space: {lr: {log: [1e-3, 1]}}}\n",
        "2:10: search.trials: `trials:` is a whole number from 1 to 2,147,483,647, got -3",
    ),
    "search_of_a_billion": (
        NAME + "search: {trials: 1000000000, space: {alpha: {uniform: [0.1, 0.2]}}}\n",
        "2:1: search: 1000000000 arms x 3 seeds = 3e+09 trials; a campaign has at most 10000",
    ),
    "search_of_nothing": (
        NAME + "search: {trials: 3, space: {}}\n",
        "2:21: search.space: nothing varies: give `space:` with at least one setting",
    ),
    "search_too_many_of_few": (
        NAME + "search: {trials: 100, space: {n_layer: {choice: [2, 4]}}}\n",
        "2:10: search.trials: 100 distinct arms requested, but the search space yields only 2",
    ),
    "search_unknown_method": (
        NAME + "search: {method: __import__('os'), trials: 3, space: {lr: {log: [1e-3, 1]}}}\n",
        "2:10: search.method: unknown method \"__import__('os')\"",
    ),
    "secret_api_key": (
        base("{tracker: {api_key: 0123456789abcdef0123456789abcdef01234567}}"),
        "2:18: a secret by its name",
    ),
    "secret_in_wandb": (
        base("{tracker: {wandb: 0123456789abcdef0123456789abcdef01234567}}"),
        "2:18: base.tracker.wandb: unknown wandb mode '0123456789abcdef0123456789abcdef01234567'",
    ),
    "secret_token": (
        NAME + "hf_token: hf_abcdefghijklmnop\nbase: {data: {hf_token: hf_abcdefghijklmnop}}\n" + SWEEP,
        "2:1: a secret by its name",
    ),
    "secret_top": (NAME + "wandb_api_key: 0123456789abcdef\n" + SWEEP, "2:7: a secret by its name"),
    "seed_hex_of_5000_digits": (
        NAME + "seeds: [0x" + "f" * 5000 + "]\n" + SWEEP,
        "2:9: 0xffffffffffffffffff\u2026ffffffffffffffffffff" + TOO_LARGE_NUMBER,
    ),
    "seed_of_5000_digits": (
        NAME + "seeds: [" + "9" * 5000 + "]\n" + SWEEP,
        "2:9: 99999999999999999999\u202699999999999999999999" + TOO_LARGE_NUMBER,
    ),
    "seed_swept": (
        NAME + "vary: {seed: [1, 2]}\n",
        "2:8: vary.seed: seeds are not swept: every arm runs all of `seeds:`",
    ),
    "seeds_boolean": (
        NAME + "seeds: [true, false]\n" + SWEEP,
        "2:9: seeds[0]: a seed is a whole number from 0 to 2147483647, got True",
    ),
    "seeds_empty": (NAME + "seeds: []\n" + SWEEP, "2:1: seeds: the list of seeds is empty"),
    "seeds_float": (
        NAME + "seeds: [1.0]\n" + SWEEP,
        "2:9: seeds[0]: a seed is a whole number from 0 to 2147483647, got 1.0",
    ),
    "seeds_fresh_at_top": (
        NAME + "seeds: fresh 5\n" + SWEEP,
        "2:1: seeds: expected a list of seeds such as [1, 2, 3], got 'fresh 5'; fresh seeds are those of a phase",
    ),
    "seeds_fresh_billion": (
        phases("{name: p, seeds: fresh 999999999, vary: {alpha: [0.1]}}"),
        "2:20: phases[0].seeds: expected `fresh`, `fresh N` with N from 1 to 9999, or a list, got 'fresh 999999999'",
    ),
    "seeds_fresh_digits": (
        phases("{name: p, seeds: fresh " + "9" * 5000 + ", vary: {alpha: [0.1]}}"),
        (
            "2:20: phases[0].seeds: expected `fresh`, `fresh N` with N from 1 to 9999, or a list, got 'fresh "
            "9999999999999999999999999999999999999999999"
        ),
    ),
    "seeds_negative": (
        NAME + "seeds: [-1]\n" + SWEEP,
        "2:9: seeds[0]: a seed is a whole number from 0 to 2147483647, got -1",
    ),
    "seeds_nested": (
        NAME + "seeds: [[1, 2]]\n" + SWEEP,
        "2:9: seeds[0]: a seed is a whole number from 0 to 2147483647, got [1, 2]",
    ),
    "seeds_range": (
        NAME + "seeds: 1..1000000\n" + SWEEP,
        "2:1: seeds: expected a list of seeds such as [1, 2, 3], got '1..1000000'",
    ),
    "seeds_too_large": (
        NAME + "seeds: [2147483648]\n" + SWEEP,
        "2:9: seeds[0]: a seed is a whole number from 0 to 2147483647, got 2147483648",
    ),
    "seeds_twice": (NAME + "seeds: [1, 1]\n" + SWEEP, "2:12: seeds[1]: seed 1 is listed twice"),
    "set_is_a_list": (
        phases("{name: p, set: [1], vary: {alpha: [0.1]}}"),
        "2:20: phases[0].set: must be a mapping of settings, got [1]",
    ),
    "string_for_a_number": (base("{steps: '3'}"), "2:8: base.steps: input should be a valid integer, got '3'"),
    "tabs": (
        NAME + "base:\n\tsteps: 3\n" + SWEEP,
        "3:1: a tab (U+0009): use spaces",
    ),
    "tag_binary": ("campaign: !!binary aGVsbG8=\n" + SWEEP, "1:11: the tag tag:yaml.org,2002:binary" + PLAIN_DATA),
    "tag_bool_lie": (base("{steps: !!int three}"), "2:15: 'three' is not a value of type 'int'"),
    "tag_directive": (
        "%TAG ! tag:evil.example,2026:\n---\ncampaign: !x y\n" + SWEEP,
        "3:11: the tag tag:evil.example,2026:x" + PLAIN_DATA,
    ),
    "tag_omap": (base("!!omap [steps: 3]"), "2:7: the tag tag:yaml.org,2002:omap" + PLAIN_DATA),
    "tag_own": (base("!mine {steps: 3}"), "2:7: the tag !mine" + PLAIN_DATA),
    "tag_python_module": (
        "campaign: !!python/module:os ''\n" + SWEEP,
        "1:11: the tag tag:yaml.org,2002:python/module:os" + PLAIN_DATA,
    ),
    "tag_python_name": (
        "campaign: !!python/name:os.system ''\n" + SWEEP,
        "1:11: the tag tag:yaml.org,2002:python/name:os.system" + PLAIN_DATA,
    ),
    "tag_python_new": (
        base("!!python/object/new:subprocess.Popen [['touch', 'pwned']]"),
        "2:7: the tag tag:yaml.org,2002:python/object/new:subprocess.Popen" + PLAIN_DATA,
    ),
    "tag_python_object": (
        base("!!python/object/apply:os.system ['touch pwned']"),
        "2:7: the tag tag:yaml.org,2002:python/object/apply:os.system" + PLAIN_DATA,
    ),
    "tag_set": (NAME + "seeds: !!set {1, 2}\n" + SWEEP, "2:8: the tag tag:yaml.org,2002:set" + PLAIN_DATA),
    "tag_str_as_number": (base("{steps: !!str 3}"), "2:8: base.steps: input should be a valid integer, got '3'"),
    "tag_url": (base("!<tag:example.com,2026:evil> {steps: 3}"), "2:7: the tag tag:example.com,2026:evil" + PLAIN_DATA),
    "time_for_a_number": (
        base("{steps: 12:30:45}"),
        "2:8: base.steps: input should be a valid integer, got '12:30:45'",
    ),
    "tokenizer_arabic": (
        NAME + "base: {data: {tokenizer: 'sentencepiece:\u0663\u0664'}}\n" + SWEEP,
        (
            "2:15: base.data.tokenizer: unknown tokenizer 'sentencepiece:\u0663\u0664', did you mean "
            "'sentencepiece:SIZE'?"
        ),
    ),
    "tokenizer_size": (
        base("{data: {tokenizer: 'sentencepiece:99999999999999999999'}}"),
        "2:15: base.data.tokenizer: unknown tokenizer 'sentencepiece:99999999999999999999'",
    ),
    "tokenizer_zero": (
        base("{data: {tokenizer: /dev/zero}}"),
        "2:15: base.data.tokenizer: unknown tokenizer '/dev/zero'",
    ),
    "toml": ('[campaign]\nname = "x"\n', "2:1: not valid YAML: expected '<document start>', but found ('<scalar>',)"),
    "truncated_utf8": (b"campaign: x\ndescription: \xe2\x82", "byte"),
    "two_documents": (NAME + "---\ncampaign: y\n", "2:1: not valid YAML: but found another document"),
    "two_kinds": (
        NAME + "vary: {alpha: [0.1]}\ngrid: {lr: [1e-3]}\n",
        "3:1: grid: a phase has exactly one of vary, grid, zip, runs, combine, search; got vary and grid",
    ),
    "unclosed_flow_mapping": (base("{steps: 3"), "3:5: not valid YAML: expected ',' or '}', but got ':'"),
    "unclosed_list": (NAME + "seeds: [1, 2\n" + SWEEP, "3:5: not valid YAML: expected ',' or ']', but got ':'"),
    "unclosed_quote": ('campaign: "x\n' + SWEEP, "3:1: not valid YAML: found unexpected end of stream"),
    "undefined_alias": (base("*nowhere"), "2:7: not valid YAML: found undefined alias 'nowhere'"),
    "vary_hex_of_5000_digits": (
        NAME + "vary: {alpha: [0x" + "f" * 5000 + ", 0.1]}\n",
        "2:16: 0xffffffffffffffffff\u2026ffffffffffffffffffff" + TOO_LARGE_NUMBER,
    ),
    "yaml_1_1_directive": (
        "%YAML 1.1\n---\ncampaign: x\nbase: {tied: yes}\n" + SWEEP,
        "4:14: 'yes' is not a value of type 'bool'",
    ),
    "yes_for_a_boolean": (
        base("{model: {tied: yes}}"),
        "2:16: base.model.tied: input should be a valid boolean, got 'yes'",
    ),
    "zero_heads": (
        base("{model: {n_head: 0}}"),
        "2:16: base.model.n_head: input should be greater than or equal to 1, got 0",
    ),
    "zero_steps": (base("{steps: 0}"), "2:8: base.steps: input should be greater than or equal to 1, got 0"),
    "zip_uneven": (
        NAME + "zip: {alpha: [0.1, 0.2], lr: [1e-3]}\n",
        "2:1: zip: zip needs lists of equal length; alpha has 2, lr has 1",
    ),
}
