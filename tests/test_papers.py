"""
PAPERS.md: every tag stands in its method file, every test exists; and each line of a
sample, when it is broken, turns the test red that is named for it.
"""
import ast
import importlib.util
import re
import sys
import types

import pytest
import torch
from conftest import ROOT

PAPERS = (ROOT / "PAPERS.md").read_text(encoding="utf-8")
SECTIONS = {re.search(r": (\w+)\.py, tests/(test_\w+)\.py\n", part).groups(): part
            for part in PAPERS.split("\n## ")[1:]}
NUMBERED = dict(glora=15, cps_lora=11, gralora=6, gfa=1)       # equations that the paper numbers


def rows(section, head):
    """The cells of each row of the section's table that begins with `head`."""
    table = section.partition(f"| {head} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()[2:]]


def names(cell):
    return re.findall(r"`((?:test_\w+\.py::)?test_\w+)`", cell)


def functions(file):
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


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
def test_a_claim_that_held_names_a_test_or_a_measurement_and_each_has_a_verdict(file, test_file):
    for what, _, _, claim in rows(SECTIONS[file, test_file],
                                  "table, figure | commands | where run | structural claim"):
        for part in filter(None, claim.split("; ")):
            assert re.search(r"\bheld\b|cannot be told|not run", part), (what, part)
            assert "not run" in part or names(part) or "README" in part or "(results)" in part, (what, part)


def test_every_row_of_a_table_has_as_many_cells_as_its_head():
    for table in re.findall(r"(?:^\|.*\n)+", PAPERS, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table[:80]


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
    ("glora", "return (V * S.sqrt()).T.contiguous(), U * S.sqrt()", "return V.T.contiguous(), U * S",
     "test_the_adapters_start_on_different_triplets_of_w_and_these_leave_the_residual",
     dict(o=20, i=24, global_init="bottom", local_init="top", G=range(14, 20), L=range(2))),
    ("glora", "order[:len(order) // 2]", "order[:(len(order) + 1) // 2]",                           # line 12
     "test_regions_are_nested_and_half_as_wide_and_high_each_time_rounded_down", dict(o=97, i=131)),
    ("glora", "M, r = W[columns]", "M, r = (layer.lora_global_B @ layer.lora_global_A + W)[columns]",
     "test_a_reinit_decomposes_the_region_of_the_merged_residual_without_the_live_global_adapter", {}),
    ("cps_lora", "self.start(*(balanced_cut(torch.randperm(n)", "self.start(*(balanced_cut(torch.arange(n)",
     "test_the_first_partition_is_random_and_balanced", {}),                                        # line 1
    ("cps_lora", "< len(X) / (2 * k)", "<= len(X) / (2 * k)",                                       # §3.3
     "test_a_cluster_is_skewed_under_half_of_the_equal_share_and_not_at_it",
     dict(m=64, few=16, skewed=False)),
    ("cps_lora", "        self.lora_B.zero_()", "        pass",                                     # line 8
     "test_a_reinit_merges_clusters_and_starts_anew", {}),
    ("cps_lora", "columns == each[:, None])[:, None]", "columns * 0 == each[:, None])[:, None]",    # Prop. 2
     "test_our_layer_reaches_proposition_2s_rank", {}),
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
    ("gralora", "columns == each[:, None])[:, None]", "columns * 0 == each[:, None])[:, None]",     # Eq. 6
     "test_the_rank_is_k_times_the_blocks_rank_plus_the_general_part", dict(k=2, hybrid=2)),
    ("gralora", "update = z.flatten(-2)  ", "update = F.linear(x_, self.delta())  ",                # §3.4
     "test_section_3_4_flops_are_2_n_r_t_plus_2_r_m_t", dict(k=2)),
    ("gralora", "update = update + F.linear(self.scaling * z", "update = update + F.linear(z",      # §3.5
     "test_eq_5_block_by_block", dict(k=2, hybrid=2)),
    ("gfa", "flat[:ctx.offset] = flat[ctx.offset + W.numel():] = 0", "pass",                        # padding
     "test_padding_reaches_no_weight_and_gets_no_gradient", {}),
    ("gfa", "self.shared.lora_B[first:last], self.shared.lora_A, offset",                           # Alg. 1
     "self.shared.lora_B[:last], self.shared.lora_A, offset + first * self.shared.lora_A.shape[1]",
     "test_algorithm_1_forms_only_the_rows_that_a_module_meets", {}),
    ("gfa", "k = math.isqrt(d)", "k = math.isqrt(d) - 59",                                          # §2
     "test_at_realistic_sizes_shifted_windows_reach_full_local_rank", {}),
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
