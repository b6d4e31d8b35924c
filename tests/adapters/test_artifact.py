import json
import math
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError

from objdrive.adapters import adapter as adapter_module
from objdrive.adapters.adapter import Adapter
from objdrive.adapters.artifact import (
    EMBEDDING_FILE,
    LORA_FILE,
    ArtifactMetadata,
    BaseRef,
    FileRecord,
    Member,
    Preview,
    SceneMember,
    SourceRecord,
    Sources,
    adapter_digest,
    library_versions,
)
from objdrive.base.family import STABLE_DIFFUSION
from objdrive.errors import ObjdriveError

adapter_files = partial(adapter_module.adapter_files, family=STABLE_DIFFUSION)
parse_adapter = partial(adapter_module.parse_adapter, family=STABLE_DIFFUSION)

TOKEN = "<mug-1>"
MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def an_adapter(rank=4, inside=6, outside=5):
    generator = torch.Generator().manual_seed(0)
    return Adapter(
        lora={
            f"{MODULE}.lora_A.weight": torch.randn(rank, inside, generator=generator),
            f"{MODULE}.lora_B.weight": torch.randn(outside, rank, generator=generator),
        },
        embeddings={"clip_l": torch.randn(8, generator=generator)},
    )


def some_metadata(**changes):
    fields = {
        "object_id": "mug-1",
        "class_name": "mug",
        "token": TOKEN,
        "phrase": f"{TOKEN} mug",
        "digest": "0123456789abcdef" * 2,
        "members": [SceneMember(object_id="mug-1", class_name="mug", token=TOKEN)],
        "base": BaseRef(id="tiny64", fingerprint="f" * 16),
        "recipe": {"steps": 300},
        "recipe_digest": "r",
        "method_version": 1,
        "metrics": {"loss": 0.25},
        "sources": Sources(image=SourceRecord(uri="s3://in/mug.png", size=10, mark="etag")),
        "versions": library_versions(),
        "created": "2026-11-22T18:45:00Z",
    }
    return ArtifactMetadata(**fields | changes)


class TestDigest:
    members = (Member("a" * 64, "b" * 64, "teapot"), Member("c" * 64, "", "straw hat"))
    keys = {"recipe_digest": "r1", "base_fingerprint": "f1", "method_version": 3}  # noqa: RUF012

    def test_is_the_sha256_of_the_canonical_json(self):
        # printf '<the JSON, keys sorted, no spaces>' | sha256sum | cut -c-32
        assert adapter_digest(self.members, **self.keys) == "03ac93e0bb7c81e8e8d74c328cf3bce6"

    def test_depends_on_everything(self):
        first, second = self.members
        variants = [
            adapter_digest(self.members, **self.keys),
            adapter_digest((second, first), **self.keys),
            adapter_digest((first,), **self.keys),
            adapter_digest((Member("x" * 64, "b" * 64, "teapot"), second), **self.keys),
            adapter_digest((Member("a" * 64, "x" * 64, "teapot"), second), **self.keys),
            adapter_digest((Member("a" * 64, "b" * 64, "kettle"), second), **self.keys),
            adapter_digest(self.members, **self.keys | {"recipe_digest": "r2"}),
            adapter_digest(self.members, **self.keys | {"base_fingerprint": "f2"}),
            adapter_digest(self.members, **self.keys | {"method_version": 4}),
        ]
        assert len(set(variants)) == len(variants)


class TestFiles:
    def test_round_trip_keeps_every_bit(self):
        adapter = an_adapter()
        parsed = parse_adapter(adapter_files(adapter, token=TOKEN), token=TOKEN)
        assert parsed.lora.keys() == adapter.lora.keys()
        for key, tensor in adapter.lora.items():
            torch.testing.assert_close(parsed.lora[key], tensor, rtol=0, atol=0)
        torch.testing.assert_close(parsed.embeddings, adapter.embeddings, rtol=0, atol=0)

    def test_names_are_those_of_diffusers(self):
        files = adapter_files(an_adapter(), token=TOKEN)
        lora = safetensors.torch.load(files[LORA_FILE])
        assert set(lora) == {f"unet.{MODULE}.lora_A.weight", f"unet.{MODULE}.lora_B.weight"}
        assert set(safetensors.torch.load(files[EMBEDDING_FILE])) == {TOKEN}

    def test_the_embedding_file_is_diffusers_textual_inversion(self):
        adapter = an_adapter()
        data = adapter_files(adapter, token=TOKEN)[EMBEDDING_FILE]
        expected = safetensors.torch.save({TOKEN: adapter.embeddings["clip_l"]}, metadata={"format": "pt"})
        assert data == expected

    def test_equal_adapters_give_equal_bytes(self):
        assert adapter_files(an_adapter(), token=TOKEN) == adapter_files(an_adapter(), token=TOKEN)

    def test_slices_of_stacked_trainable_tensors_are_written_alone(self):
        stacked = torch.randn(3, 4, 6, requires_grad=True)
        transposed = torch.randn(3, 4, 5, requires_grad=True)
        adapter = Adapter(
            {f"{MODULE}.lora_A.weight": stacked[1], f"{MODULE}.lora_B.weight": transposed[1].T},
            {"clip_l": torch.randn(3, 8)[1]},
        )
        files = adapter_files(adapter, token=TOKEN)
        parsed = parse_adapter(files, token=TOKEN)
        assert torch.equal(parsed.lora[f"{MODULE}.lora_A.weight"], stacked[1])
        assert torch.equal(parsed.lora[f"{MODULE}.lora_B.weight"], transposed[1].T)
        assert len(files[LORA_FILE]) < 4 * (stacked.numel() + transposed.numel())

    def test_an_adapter_without_lora_has_no_lora_file(self):
        adapter = Adapter({}, {"clip_l": torch.ones(8)})
        files = adapter_files(adapter, token=TOKEN)
        assert set(files) == {EMBEDDING_FILE}
        assert parse_adapter(files, token=TOKEN).lora == {}

    def test_other_files_are_ignored(self):
        files = adapter_files(an_adapter(), token=TOKEN) | {"previews/0.png": b"..."}
        assert parse_adapter(files, token=TOKEN).lora


class TestRefusals:
    @pytest.mark.parametrize(
        ("key", "tensor", "message"),
        [
            ("lora_A.weight", torch.ones(3, 6), "differ in rank"),
            ("lora_A.weight", torch.ones(4, 6, 1), r"shape \(4, 6, 1\)"),
            ("lora_A.weight", torch.ones(0, 6), r"shape \(0, 6\)"),
            ("lora_A.weight", torch.ones(4, 6, dtype=torch.int32), "dtype torch.int32"),
            ("lora_B.weight", torch.full((5, 4), math.nan), "not finite"),
            ("lora_B.weight", torch.full((5, 4), math.inf), "not finite"),
            ("alpha", torch.ones(1, 1), "not named"),
        ],
    )
    def test_of_lora_tensors_when_written_and_when_read(self, key, tensor, message):
        bad = Adapter(an_adapter().lora | {f"{MODULE}.{key}": tensor}, {"clip_l": torch.ones(8)})
        with pytest.raises(ObjdriveError, match=f"{MODULE}.*{message}"):
            adapter_files(bad, token=TOKEN)
        files = adapter_files(an_adapter(), token=TOKEN)
        files[LORA_FILE] = safetensors.torch.save({f"unet.{k}": v for k, v in bad.lora.items()})
        with pytest.raises(ObjdriveError, match=f"{MODULE}.*{message}"):
            parse_adapter(files, token=TOKEN)

    def test_of_a_module_with_half_a_pair(self):
        lora = an_adapter().lora
        del lora[f"{MODULE}.lora_B.weight"]
        with pytest.raises(ObjdriveError, match="has only one of"):
            adapter_files(Adapter(lora, {"clip_l": torch.ones(8)}), token=TOKEN)

    def test_of_tensors_outside_the_unet(self):
        files = adapter_files(an_adapter(), token=TOKEN)
        files[LORA_FILE] = safetensors.torch.save({"text_encoder.q.lora_A.weight": torch.ones(1, 1)})
        with pytest.raises(ObjdriveError, match=r"text_encoder\.q"):
            parse_adapter(files, token=TOKEN)

    def test_of_the_embedding_of_another_token(self):
        with pytest.raises(ObjdriveError, match=r"<mug-1>.*expected only '<mug-2>'"):
            parse_adapter(adapter_files(an_adapter(), token=TOKEN), token="<mug-2>")

    @pytest.mark.parametrize("embedding", [torch.ones(1, 8), torch.full((8,), math.nan), torch.ones(8).int()])
    def test_of_embeddings_that_are_none(self, embedding):
        with pytest.raises(ObjdriveError, match="the embedding for 'clip_l' has"):
            adapter_files(Adapter({}, {"clip_l": embedding}), token=TOKEN)

    def test_of_embeddings_for_other_text_encoders(self):
        vectors = {"clip_l": torch.ones(8), "clip_g": torch.ones(8)}
        with pytest.raises(ObjdriveError, match=r"for \['clip_g', 'clip_l'\], expected only 'clip_l'"):
            adapter_files(Adapter({}, vectors), token=TOKEN)

    def test_of_a_missing_embedding(self):
        with pytest.raises(ObjdriveError, match=EMBEDDING_FILE):
            parse_adapter({}, token=TOKEN)

    @pytest.mark.parametrize("name", [LORA_FILE, EMBEDDING_FILE])
    def test_of_files_that_are_no_safetensors(self, name):
        files = adapter_files(an_adapter(), token=TOKEN)
        for broken in (b"", b"PK\x03\x04", files[name][:-1]):
            with pytest.raises(ObjdriveError, match=f"{name} is not a readable"):
                parse_adapter(files | {name: broken}, token=TOKEN)


class TestMetadata:
    def test_json_round_trip(self):
        metadata = some_metadata(
            previews=[Preview(file="previews/0.png", kind="picture", caption="on a beach")],
            files={"previews/0.png": FileRecord.of(b"png")},
        )
        assert ArtifactMetadata.model_validate_json(metadata.model_dump_json()) == metadata

    @pytest.mark.parametrize(
        ("caption", "kind"),
        [
            ("input", "input"),
            ("mask", "mask"),
            ("mended mask", "mended_mask"),
            ("prototype only: a photo of {} on grass", "prototype"),
            ("a photo of {} on grass", "picture"),
        ],
    )
    def test_previews_noted_without_a_kind_get_the_one_that_their_caption_says(self, caption, kind):
        document = json.loads(some_metadata().model_dump_json())
        document["previews"] = [{"file": "previews/0.webp", "caption": caption}]
        [preview] = ArtifactMetadata.model_validate_json(json.dumps(document)).previews
        assert preview == Preview(file="previews/0.webp", kind=kind, caption=caption)

    def test_a_previews_kind_is_not_guessed_where_it_is_noted(self):
        assert Preview(file="previews/0.webp", kind="picture", caption="mask").kind == "picture"

    def test_columns_of_any_type_become_json(self):
        row = {
            "listed": datetime(2026, 1, 2, tzinfo=UTC),
            "price": Decimal("9.90"),
            "thumbnail": b"\xff\x00",
            "weight": math.nan,
            "tags": ("a", "b"),
        }
        written = json.loads(some_metadata(row=row).model_dump_json())["row"]
        assert written == {
            "listed": "2026-01-02T00:00:00Z",
            "price": "9.90",
            "thumbnail": "_wA=",
            "weight": None,
            "tags": ["a", "b"],
        }

    @pytest.mark.parametrize(
        "changes",
        [
            {"object_id": "../up"},
            {"object_id": ""},
            {"object_id": "x" * 129},
            {"object_id": "mug\n"},
            {"digest": "0" * 31},
            {"schema_version": 2},
            {"metrics": {"loss": math.nan}},
            {"files": {"../../etc/passwd": FileRecord.of(b"")}},
            {"files": {"previews/.hidden": FileRecord.of(b"")}},
            {"unheard_of": 1},
            {"previews": [{"file": "previews/0.webp", "kind": "sketch", "caption": "a sketch"}]},
            {"previews": [{"file": "previews/0.webp"}]},
        ],
    )
    def test_refuses_what_no_artifact_says(self, changes):
        with pytest.raises(ValidationError):
            some_metadata(**changes)


def test_library_versions_are_those_installed():
    versions = library_versions()
    assert set(versions) == {"objdrive", "torch", "diffusers", "peft", "transformers"}
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
