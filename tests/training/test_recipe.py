import pytest
from pydantic import ValidationError

from objdrive.errors import ObjdriveError
from objdrive.training.recipe import PRESETS, Recipe, make_recipe


def test_the_default_recipe_is_the_preset_objdrive():
    assert make_recipe() == make_recipe("objdrive") == Recipe()


def test_presets_differ_in_what_makes_the_method():
    recipes = {name: make_recipe(name) for name in PRESETS}
    assert set(recipes) == {"objdrive", "paper", "dreambooth", "textual_inversion", "lora", "t_lora"}
    assert len({recipe.digest for recipe in recipes.values()}) == len(recipes)
    assert all(recipe.preset == name for name, recipe in recipes.items())
    assert recipes["textual_inversion"].rank == 0
    assert recipes["lora"].embedding_lr == recipes["dreambooth"].embedding_lr == 0
    assert recipes["dreambooth"].ccr_target == "noise"
    assert not any(recipes[name].masked for name in ("dreambooth", "textual_inversion", "lora", "t_lora"))
    assert [name for name, recipe in recipes.items() if recipe.least_rank is not None] == ["t_lora"]
    paper = recipes["paper"]
    assert (paper.embedding_start, paper.masked, paper.soft_mask) == ("prototype", True, False)
    assert (paper.least_fill, paper.zoom, paper.timesteps) == (0, 0, "uniform")
    assert (paper.mend_masks, paper.plain_ground) == (False, False)
    assert (paper.ccr_target, paper.ccr_weight > 0) == ("base", True)
    assert (paper.ccr_unconditional, paper.ccr_background) == (0, False)


class TestLayers:
    def test_the_bases_tuning_goes_over_the_defaults_but_not_over_the_method(self):
        tuning = {"steps": 7, "rank": 4, "embedding_lr": 0.5}
        assert make_recipe("objdrive", tuning=tuning).rank == 4
        inversion = make_recipe("textual_inversion", tuning=tuning)
        assert (inversion.steps, inversion.rank, inversion.embedding_lr) == (7, 0, 0.5)
        assert make_recipe("lora", tuning=tuning).embedding_lr == 0

    def test_what_suits_a_base_with_one_preset_goes_over_what_suits_it_with_all(self):
        tuning = {"steps": 7, "lora_lr": 0.5, "presets": {"paper": {"lora_lr": 0.25}, "lora": {"embedding_lr": 0.125}}}
        assert [make_recipe(name, tuning=tuning).lora_lr for name in ("objdrive", "paper")] == [0.5, 0.25]
        assert make_recipe("paper", tuning=tuning).steps == 7
        assert make_recipe("paper", tuning=tuning, overrides=["lora_lr=1"]).lora_lr == 1
        assert make_recipe("lora", tuning=tuning).embedding_lr == 0

    def test_tuning_for_a_preset_that_is_none_is_refused(self):
        with pytest.raises(ObjdriveError, match="unknown preset 'objdrvie': choose from"):
            make_recipe("paper", tuning={"presets": {"objdrvie": {"lora_lr": 0.25}}})

    def test_a_file_goes_over_its_preset_and_overrides_go_over_all(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("preset: paper\nsteps: 30\nzoom: 0.25\n")
        recipe = make_recipe(str(path), tuning={"steps": 7, "rank": 3}, overrides=["steps=9", "seed=5"])
        assert (recipe.preset, recipe.steps, recipe.seed, recipe.rank, recipe.zoom) == ("paper", 9, 5, 3, 0.25)
        assert not recipe.soft_mask

    def test_a_file_without_a_preset_starts_from_objdrive(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("lora_lr: 2e-3\n")
        assert make_recipe(str(path)) == Recipe(lora_lr=0.002)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("steps=80", "steps", 80),
        ("steps=1e2", "steps", 100),
        ("lora_lr=2e-3", "lora_lr", 0.002),
        ("lora_lr = 0.5", "lora_lr", 0.5),
        ("masked=False", "masked", False),
        ("soft_mask=no", "soft_mask", False),
        ("timesteps=uniform", "timesteps", "uniform"),
        ("embedding_start=random", "embedding_start", "random"),
        ("phrase={token}", "phrase", "{token}"),
        ("phrase={token} {class}", "phrase", "{token} {class}"),
        ('prompts=["a rendering of {}", "{} there"]', "prompts", ("a rendering of {}", "{} there")),
    ],
)
def test_overrides_read_as_people_write_them(override, field, value):
    got = getattr(make_recipe(overrides=[override]), field)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps"], r"'steps' must read key=value, as in steps=80"),
        (["stepz=3"], r"stepz: .*\(got 3\)"),
        (["steps=-1"], r"steps: .*greater than or equal to 0 \(got -1\)"),
        (["steps=many"], r"steps: .*\(got 'many'\)"),
        (["lora_lr=inf"], r"lora_lr: .*finite"),
        (["ccr_weight=nan"], r"ccr_weight: .*finite"),
        (["seed=4294967296"], r"seed: "),
        (["prompts=[no place]"], r"'no place' must hold {} exactly once"),
        (["prompts=['{} and {}']"], r"'{} and {}' must hold {} exactly once"),
        (["rank=0", "embedding_lr=0"], "nothing to train: raise one of them"),
        (["ccr_target=noise"], "ccr_unconditional=1.0 keeps what the base predicts and needs ccr_target=base"),
        (
            ["ccr_target=noise", "ccr_unconditional=0"],
            "ccr_background=True keeps what the base predicts and needs ccr_target=base, or set ccr_background=false",
        ),
        (["preset=paper"], r"'preset=paper' comes too late"),
    ],
)
def test_bad_overrides_are_refused_with_the_value(overrides, message):
    with pytest.raises(ObjdriveError, match=message):
        make_recipe(overrides=overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n", "must be a mapping of fields, got list"),
        (b"", "must be a mapping of fields, got NoneType"),
        (b"a: [", "can't be read as YAML"),
        (b"\xff\xfe\xfa", "can't be read as YAML"),
        (b"preset: ours\n", "unknown preset 'ours': choose from objdrive, paper"),
        (b"1: 2\n", "not valid"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ObjdriveError, match=message):
        make_recipe(str(path))


def test_what_is_neither_preset_nor_file_is_refused():
    with pytest.raises(ObjdriveError, match=r"no recipe 'papre': neither a preset \(objdrive, paper"):
        make_recipe("papre")


class TestDigest:
    def test_depends_on_every_value_and_not_on_how_it_was_given(self):
        changed = {
            "seed": 1,
            "steps": 1,
            "prompts": ("{}",),
            "phrase": "{token} {class}",
            "rank": 1,
            "least_rank": 1,
            "lora_lr": 1.0,
            "embedding_start": "random",
            "embedding_lr": 1.0,
            "prototype_steps": 1,
            "prototype_lr": 1.0,
            "warmup_steps": 1,
            "max_grad_norm": 0.5,
            "views": 9,
            "mend_masks": False,
            "least_fill": 0.125,
            "plain_ground": False,
            "placements": 2,
            "least_placed_fill": 0.125,
            "most_placed_fill": 0.9,
            "mirrored": False,
            "layout_noise": 2.0,
            "zoom": 0.125,
            "masked": False,
            "soft_mask": False,
            "timesteps": "uniform",
            "ccr_weight": 0.125,
            "ccr_target": "noise",
            "ccr_unconditional": 0.25,
            "ccr_background": True,
            "class_samples": 9,
            "class_pool": 9,
            "sample_steps": 9,
            "guidance_scale": 1.5,
        }
        assert set(changed) == set(Recipe.model_fields) - {"preset"}
        # Without these, the target of the regularization and the ground can't be others.
        start = {"ccr_unconditional": 0.0, "ccr_background": False, "placements": 1}
        digests = {Recipe(**start | {field: value}).digest for field, value in changed.items()}
        assert len(digests | {Recipe(**start).digest}) == len(changed) + 1
        assert make_recipe(overrides=["ccr_weight=2", "steps=1e2"]).digest == Recipe(ccr_weight=2.0, steps=100).digest

    def test_does_not_depend_on_the_presets_name(self):
        paper = make_recipe("paper")
        assert Recipe(**paper.model_dump(exclude={"preset"})).digest == paper.digest

    def test_survives_json(self):
        recipe = make_recipe("dreambooth")
        assert Recipe.model_validate_json(recipe.model_dump_json()).digest == recipe.digest


def test_a_recipe_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().steps = 3
