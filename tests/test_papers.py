"""
PAPERS.md: every tag stands in its method file, every test exists, every command is understood by train.py; and a
sample of tagged lines, broken one at a time, each turn the test that is named for them red.
"""
import ast
import importlib.util
import itertools
import re
import shlex
import sys
import types

import pytest
import torch
from conftest import ROOT

import train

PAPERS = (ROOT / "PAPERS.md").read_text(encoding="utf-8")
SECTIONS = {re.search(r": (\w+)\.py, tests/(test_\w+)\.py\n", part).groups(): part
            for part in PAPERS.split("\n## ")[1:]}
NUMBERED = dict(glora=15, cps_lora=11, gralora=6, gfa=1)       # equations that the paper numbers
FLAGS = re.findall(r"`(--method [^`]+)`", PAPERS)


def rows(section, head):
    """The cells of each row of the section's table that begins with `head`."""
    table = section.partition(f"| {head} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()[2:]]


def names(cell):
    return re.findall(r"`((?:test_\w+\.py::)?test_\w+)`", cell)


def functions(file):
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def expanded(flags):
    """One command for each word of each pair of braces, as a shell has it."""
    parts = [part.split(",") for part in re.split(r"[{}]", flags)]
    parts[::2] = [[",".join(words)] for words in parts[::2]]        # outside of braces a comma is a comma
    return ["".join(words) for words in itertools.product(*parts)]


def test_it_maps_the_four_papers_in_at_most_320_lines():
    assert [file for file, _ in SECTIONS] == list(NUMBERED)
    assert len(PAPERS.splitlines()) <= 320


@pytest.mark.parametrize("file, test_file", SECTIONS)
def test_every_tag_stands_in_its_file(file, test_file):
    source, tags = (ROOT / f"{file}.py").read_text(encoding="utf-8"), 0
    for what, cell, _ in rows(SECTIONS[file, test_file], "paper | tags in the file | tests"):
        found = re.findall("`([^`]+)`", cell)
        assert found or cell.startswith("none: "), what
        for tag in found:
            assert re.search(re.escape(tag) + r"(?!\d)", source), f"{what}: {tag}"
        tags += len(found)
    assert tags >= 10


@pytest.mark.parametrize("file, test_file", SECTIONS)
def test_every_numbered_equation_has_a_row_and_every_one_that_the_file_names_is_among_them(file, test_file):
    def numbers(text):
        spans = [re.findall(r"(\d+)(?: - (\d+))?", found)
                 for found in re.findall(r"Eqs?\. (\d+(?:(?:, | - )\d+)*)", text)]
        return {n for found in spans for a, b in found for n in range(int(a), int(b or a) + 1)}
    table = rows(SECTIONS[file, test_file], "paper | tags in the file | tests")
    listed = set().union(*(numbers(what) for what, _, _ in table))
    assert listed == set(range(1, NUMBERED[file] + 1))
    assert numbers((ROOT / f"{file}.py").read_text(encoding="utf-8")) <= listed


@pytest.mark.parametrize("file, test_file", SECTIONS)
def test_every_named_test_exists_and_what_is_computed_has_one(file, test_file):
    for what, cell, tests in rows(SECTIONS[file, test_file], "paper | tags in the file | tests"):
        assert names(tests) or "no file yet" in cell, what
    named = names(SECTIONS[file, test_file])
    assert len(named) >= 10
    for name in named:
        where, _, name = name.rpartition("::")
        assert name in functions(where or f"{test_file}.py"), name


@pytest.mark.parametrize("file, test_file", SECTIONS)
def test_a_claim_that_held_names_a_test_or_a_measurement_and_the_others_were_not_run(file, test_file):
    for what, _, _, claim in rows(SECTIONS[file, test_file],
                                  "table, figure | commands | where run | structural claim"):
        for part in filter(None, claim.split("; ")):
            if re.search(r"\bheld\b", part):
                assert names(part) or "README" in part or "see below" in part, (what, part)
            else:
                assert "not run" in part or re.search(r"step \d", part), (what, part)


def test_braces_expand_as_a_shells_do():
    assert expanded("--a {x,y} --b q,v --c z{1,2}") == [
        "--a x --b q,v --c z1", "--a x --b q,v --c z2", "--a y --b q,v --c z1", "--a y --b q,v --c z2"]


@pytest.mark.parametrize("flags", FLAGS)
def test_every_command_is_understood(flags):
    for command in expanded(flags):
        args, method = train.parse(["--model", "DIR", "--data", "DIR", *shlex.split(command)])
        assert args.model == "DIR" and method.__file__.endswith(f"{args.method}.py")


def test_there_are_commands_for_each_papers_tables():
    for (file, _), section in SECTIONS.items():
        assert len(re.findall(r"`--method", section)) >= 4, file


# ---------------------------------------------------------------------- mutants of tagged lines

MUTANTS = [     # file, a line's part, what replaces it, test of tests/test_<file>.py, its arguments
    ("glora", "lambda L, g: (L * g).abs(),   ", "lambda L, g: g.abs(),",                            # Eq. 9
     "test_the_score_is_the_mean_over_the_stage_or_its_last_step_and_starts_anew",
     dict(strategy="taylor", formula=lambda L, g: abs(L * g), window="stage")),
    ("glora", "argsort(descending=True, stable=True)", "argsort(stable=True)",                      # Eq. 10
     "test_equations_2_to_15_as_printed_over_three_stages", {}),
    ("glora", "W = layer.move(+1)", "W = layer.write(layer.lora_fixed_A, layer.lora_fixed_B)",      # Eq. 11
     "test_equations_2_to_15_as_printed_over_three_stages", {}),
    ("glora", "W[columns][:, rows], 2 * len(A)", "W[columns][:, rows], len(A)",                     # Eq. 13
     "test_regions_are_nested_and_half_as_wide_and_high_each_time_rounded_down", dict(o=64, i=48)),
    ("glora", "lora_fixed_B = nn.Buffer(G_A.clone()), nn.Buffer(-G_B)",                             # Eq. 5
     "lora_fixed_B = nn.Buffer(G_A.clone()), nn.Buffer(0 * G_B)",
     "test_equations_2_to_15_as_printed_over_three_stages", {}),
    ("glora", "return r * (n + m) >= n * m", "return r * (n + m) > n * m",                          # §3.2.2
     "test_the_stage_from_which_a_pair_would_cost_as_much_as_the_region",
     dict(o=4096, i=4096, r_l=2, first=5)),
    ("cps_lora", "inner @ ref / norms.clamp", "inner @ ref / (norms * norms).clamp",                # App. E
     "test_the_cosine_order_is_that_of_the_dense_rows", dict(reference="longest", absolute=False)),
    ("cps_lora", "P / D_r.clamp(min=eps * D_r.max()).sqrt()[:, None]", "P",                         # Eq. 2
     "test_the_spectral_embedding_is_that_of_the_dense_matrix", dict(m=40, n=30, R=5, d=1)),
    ("cps_lora", "U[:, 1:d + 1], Q_Q @ Vh[1:d + 1].T", "U[:, :d], Q_Q @ Vh[:d].T",                  # Eq. 3
     "test_the_spectral_embedding_is_that_of_the_dense_matrix", dict(m=40, n=30, R=5, d=1)),
    ("cps_lora", "balanced_cut(X[:, 0].argsort(), k) if balance1", "cosine(L, R) if balance1",      # Eq. 4
     "test_skewed_clusters_fall_back_to_a_balanced_cut", {}),
    ("cps_lora", "A = A * (rows == each", "A = A * (rows.flip(0) == each",                          # Eq. 8
     "test_eq_8_by_loops_with_the_permutations_as_printed", dict(sizes={})),
    ("cps_lora", "A, B = layer.expanded()          ", "A, B = layer.total()",                       # line 4
     "test_only_the_stage_that_ended_is_clustered", {}),
    ("cps_lora", "layer.lora_merged_A, layer.lora_merged_B = layer.total()", "pass",                # line 6
     "test_every_strategy_leaves_the_function_and_partitions_everything", dict(strategy="cosine")),
    ("gralora", 'einsum("...jr,rjo->...jo", self.scaling * z,',                                     # Eq. 5
     'einsum("...jr,rjo->...jo", self.scaling * z.flip(-2),',
     "test_eq_5_block_by_block", dict(k=2, hybrid=0)),
    ("gralora", "A * (rows == each[:, None])[:, None]", "A * (rows == each[:, None]).flip(0)[:, None]",
     "test_fig_5_the_sparse_factors_hold_every_block_once", {}),                                    # Fig. 5
    ("gralora", "-math.sqrt(k / i), math.sqrt(k / i)", "-math.sqrt(1 / i), math.sqrt(1 / i)",       # fan-in
     "test_init_is_kaiming_uniform_per_block_and_b_is_zero", {}),
    ("gralora", "alpha = 2 * rank if", "alpha = 2 * (rank - hybrid) if",                            # §4.1
     "test_alpha_is_2r_of_the_total_rank", {}),
    ("gralora", "rank > 8 * k * k", "rank > 8 * k", "test_section_3_4_the_choice_of_k", dict(rank=64, k=4)),
    ("gfa", "return -(-d // k), k", "return d // k + 1, k",                                         # Step 2
     "test_step_2_k_is_the_root_of_d_and_m_what_it_takes", dict(d=16, m=4, k=4)),
    ("gfa", "rows.flatten()[offset:offset + math.prod(shape)].view(shape)",                         # Step 4
     "rows.T.flatten()[offset:offset + math.prod(shape)].view(shape)",
     "test_step_4_slices_are_disjoint_and_cover_the_vector_in_order", {}),
    ("gfa", "return (delta.add_(W),) if", "return (delta.sub_(W),) if",                             # line 3
     "test_steps_1_to_4_forward_and_gradients_are_the_printed_ones", {}),
    ("gfa", "y + F.linear(x, delta)", "y - F.linear(x, delta)",                                     # line 4
     "test_a_bf16_base_does_not_round_the_update_away", {}),
    ("gfa", "torch.zeros(m, rank, **new)", "torch.ones(m, rank, **new)",                            # Step 3
     "test_init_b_is_zero_and_a_has_standard_deviation_sigma", {})]


def run(file, source, test, arguments):
    """The test, anew from its file, with a method module of this source in the place of the real one."""
    method, name = types.ModuleType(file), f"test_{file}"
    method.__file__ = str(ROOT / f"{file}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_of_a_mutant", ROOT / "tests" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, file, method)
        exec(compile(source, method.__file__, "exec"), method.__dict__)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        getattr(module, test)(**arguments)


@pytest.mark.parametrize("file, old, new, test, arguments", MUTANTS,
                         ids=[f"{file}-{j}" for j, (file, *_) in enumerate(MUTANTS)])
def test_a_mutant_of_a_tagged_line_is_caught_by_the_test_named_for_it(file, old, new, test, arguments):
    source = (ROOT / f"{file}.py").read_text(encoding="utf-8")
    assert source.count(old) == 1 and f"`{test}`" in SECTIONS[file, f"test_{file}"]
    run(file, source, test, arguments)
    with pytest.raises(AssertionError):
        run(file, source.replace(old, new), test, arguments)


def test_each_method_file_has_at_least_two_mutants():
    assert all(sum(file == mutant[0] for mutant in MUTANTS) >= 2 for file, _ in SECTIONS)
