"""Every model family of transformers that can be built tiny: as with eager attention, padded or not; and the report of
what was changed is true, module by module.
"""

import importlib.util
from collections import Counter

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers (pip install 'fastattn[models]')", allow_module_level=True)

import transformers

from fastattn import replace_attention
from fastattn.bench.models.families import NotBuilt, built, families, padded
from fastattn.integrations import transformers as ours
from fastattn.integrations.transformers.replacement import attending, uses_interface

LISTED = (5, 23)
"""The version that the lists below were made with."""
LEAST = 450

NOT_BUILT = {
    "needs a package that is not here": """
        conditional_detr dab-detr deformable_detr detr dinat edgetam edgetam_vision_model fast_vlm gemma3n_vision
        higgs_audio_v2_tokenizer layoutlmv2 omdet-turbo pe_audio_video pe_audio_video_encoder pe_video
        pe_video_encoder perception_lm table-transformer timm_backbone timm_wrapper
    """,
    "has no model class that is its configuration's alone": """
        blip_text_model edgetam_mask_decoder edgetam_prompt_encoder edgetam_video_mask_decoder
        edgetam_video_prompt_encoder gemma4_unified_audio gemma4_unified_vision idefics_perciever idefics_vision
        layoutxlm nougat pp_chart2table pp_chart2table_vision sam2_mask_decoder sam2_prompt_encoder
        sam2_video_mask_decoder sam2_video_prompt_encoder sam3_geometry_encoder sam3_lite_text_geometry_encoder
        sam3_tracker_mask_decoder sam3_tracker_prompt_encoder sam3_tracker_video_mask_decoder
        sam3_tracker_video_prompt_encoder sam_hq_mask_decoder sam_hq_prompt_encoder sam_mask_decoder
        sam_prompt_encoder sapiens2_head t5_gemma_module vibevoice_diffusion voxtral_realtime_text
    """,
    "stays larger than MOST_PARAMETERS": """
        align align_vision_model bark blt chameleon_vqgan chmv2 deimv2 edgetam_video efficientnet emu3_vqgan encodec
        fastspeech2_conformer_hifigan fastspeech2_conformer_with_hifigan florence2 florence_vision hgnet_v2
        inkling_mm_model inkling_vision janus janus_vqgan llama4 llama4_vision_model mimi_encoder muse_glimmer
        neucodec perceiver pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4 pp_ocrv5_server_rec qwen2_5_omni_bigvgan
        qwen2_5_omni_token2wav rag rt_detr rt_detr_v2 sam2 sam2_hiera_det_model sam2_video sam2_vision_model
        sam3_tracker_video sam3_video seamless_m4t seamless_m4t_v2 speecht5_hifigan textnet tipsv2_dpt tvp univnet
        vibevoice vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder
        vibevoice_acoustic_tokenizer_encoder vibevoice_asr vits vjepa2 xcodec xcodec2 zoedepth
    """,
    "its configuration wants sizes that fit each other": """
        bamba blip_2_qformer bridgetower_vision_model cohere_compass cohere_compass_text csm cvt dbrx depth_pro
        diffusion_gemma diffusion_gemma_text dots3_note dots3_note_audio_encoder dots3_note_vision_encoder
        efficientloftr esmfold2 fun_asr_nano gemma3n gemma4_assistant glm5_next glm5_next_text gradium_phonon_tts
        granitemoehybrid kyutai_speech_to_text lw_detr lw_detr_vit mamba2 mimi mimi_decoder mobilevitv2 molmo2
        moonshine_streaming muse_spark muse_spark_audio musicgen musicgen_melody nemo_speechlm
        nemotron3_5_transcribe_audio nemotron3_5_transcribe_word_timestamp nemotron3_diarization nemotron_h_omni
        pix2struct_text_model pocket_tts pocket_tts_audio_tokenizer pocket_tts_audio_tokenizer_decoder
        qwen3_omni_moe_talker_text superglue t5gemma2_decoder t5gemma2_encoder t5gemma2_text zamba zamba2 zaya
    """,
    "its forward wants inputs that fit its kind alone": """
        audio-spectrogram-transformer audioflamingo3_encoder autoformer bailing_hybrid blip-2 blt_local_decoder
        blt_local_encoder chameleon clap clvp clvp_encoder convnext convnextv2 d_fine decision_transformer
        deepseek_ocr2 deepseek_ocr2_encoder deepseek_ocr2_text deepseek_ocr2_vision depth_anything dia dia_decoder
        emu3 ernie4_5_vl_moe ernie4_5_vl_moe_text fun_asr_nano_encoder gemma4_audio gemma4_unified_assistant
        gemma4_vision glm_image_vqmodel granite4_vision granite_speech5_ctc granite_speech5_encoder
        granite_speech_encoder granite_speech_plus_encoder grounding-dino idefics idefics2_perceiver inkling2_vision
        inkling_audio instructblip instructblipvideo jamba jev kimi_k25_vision kimi_linear kosmos-2 levit lfm2_moe
        lilt longcat_flash lxmert mask2former minicpm_ocr_vision minicpmv4_6_vision minicpmv4_7_vision
        mllama_vision_model mm-grounding-dino molmo2_adapter molmo2_vision moshi_depth muse_glimmer_assistant
        muse_glimmer_vision muse_spark_vision oneformer paddleocr_vl_vision pe_audio phi4_multimodal_audio pi0
        pix2struct pix2struct_vision_model pop2piano pp_formulanet pp_formulanet_vision pp_ocrv5_mobile_det
        pp_ocrv5_mobile_rec pp_ocrv5_server_det pp_ocrv6_medium_det pp_ocrv6_small_det pp_ocrv6_small_rec
        pp_ocrv6_tiny_rec prompt_depth_anything qwen2_5_omni qwen2_5_omni_audio_encoder qwen2_5_omni_dit
        qwen3_asr_encoder qwen3_omni_moe qwen3_omni_moe_audio_encoder qwen4_exp qwen4_exp_text sam3
        sam3_detr_decoder sam3_detr_encoder sam3_lite_text sam3_lite_text_detr_decoder sam3_lite_text_detr_encoder
        sam3_lite_text_mask_decoder sam3_mask_decoder sam3_tracker sam_hq seggpt shieldgemma2 siglip2
        siglip2_vision_model slanet slanext speecht5 swin2sr timesfm timesfm2_5 unlimited_ocr_vision
        unlimited_ocr_vision_encoder upernet uvdoc video_llama_3_vision vision-encoder-decoder vitmatte vitpose
        vitpose_backbone voxtral_realtime xclip xlstm xmod
    """,
}
"""Families that are not swept, by the reason."""

REFUSED = {
    "axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4", "mistral_large4", "mistral_large4_text",
}  # fmt: skip
"""Sparse attention over lists of keys: refused in a sentence."""
AS_SDPA = {"nemotron3_5_asr", "nemotron_asr_streaming", "nemotron_asr_streaming_encoder"}
"""Their code takes what eager attention's mask shows for hidden, and gives NaN: held to SDPA."""

NO_PADDING = {"blt_global_transformer"}
"""A part of a model, which takes a mask that was made for it already."""
BLIND = {
    "aimv2", "aimv2_text_model", "metaclip_2", "metaclip_2_text_model", "recurrent_gemma", "videoprism",
    "videoprism_text_model",
}  # fmt: skip
"""Padded on the left, the first tokens see no key, and are 0 where eager attention averages: these models pool such a
token, mix it with its neighbours by convolution, or put a token of their own beside it.
"""

NAMES = [name for name in families() if name not in " ".join(NOT_BUILT.values()).split()]


def run(model, inputs):
    """Every tensor of the outputs, by its path."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = model(**{name: each.clone() if torch.is_tensor(each) else each for name, each in inputs.items()})
    found = {}
    waiting = [("", result)]
    while waiting:
        path, value = waiting.pop()
        if torch.is_tensor(value):
            found[path] = value
        elif isinstance(value, dict):
            waiting += [(f"{path}.{name}", each) for name, each in value.items()]
        elif isinstance(value, tuple | list):
            waiting += [(f"{path}.{place}", each) for place, each in enumerate(value)]
    return found


def compare(got, want, real):
    """Numbers of real tokens close, and all that is no number equal. Weights nobody asked for are eager's alone."""
    assert got.keys() == {path for path in want if path in got or "attentions" not in path}
    for path, mine in got.items():
        theirs = want[path]
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, path
        if real is not None and theirs.shape[:2] == real.shape:
            mine, theirs = mine[real.bool()], theirs[real.bool()]
        if not theirs.is_floating_point():
            assert torch.equal(mine, theirs), path
        elif theirs.numel():
            largest = float(theirs.nan_to_num(0.0, 0.0, 0.0).abs().max())
            apart = lambda text, path=path: f"{path}: {text}"
            torch.testing.assert_close(mine, theirs, atol=2e-4 * largest + 1e-6, rtol=0, equal_nan=True, msg=apart)


def watched(model, inputs):
    """As `run`; the modules that ran, and those that called fastattn's attention."""
    ran, called = set(), set()
    inner = transformers.AttentionInterface._global_mapping[ours.NAME]

    def attention(module, *args, **kwargs):
        called.add(module)
        return inner(module, *args, **kwargs)

    hooks = [
        module.register_forward_pre_hook(lambda module, args, kwargs: ran.add(module), with_kwargs=True)
        for module in model.modules()
    ]
    transformers.AttentionInterface.register(ours.NAME, attention)
    try:
        return run(model, inputs), ran, called
    finally:
        transformers.AttentionInterface.register(ours.NAME, inner)
        for each in hooks:
            each.remove()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_family(name):
    try:
        model, inputs = built(name)
    except NotBuilt as reason:
        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        assert version != LISTED or "ImportError" in str(reason), f"neither built nor listed: {reason}"
        pytest.skip(f"transformers {transformers.__version__}: {reason}")
    sides = () if name in NO_PADDING else ("right",) if name in BLIND else ("right", "left")
    cases = [inputs, *filter(None, (padded(inputs, side) for side in sides))]
    if name in AS_SDPA:
        model.set_attn_implementation("sdpa")
    wants = [run(model, case) for case in cases]
    report = replace_attention(model)
    rows = {row.path: row for row in report.rows}
    through = {module for _, module in attending(model)}
    assert rows[""].changed == bool(through and model._can_set_attn_implementation())
    for case, want in zip(cases, wants, strict=True):
        if name in REFUSED:
            with pytest.raises(ValueError, match="passes indices="):
                run(model, case)
            continue
        got, ran, called = watched(model, case)
        compare(got, want, case.get("attention_mask"))
        if rows[""].changed:
            assert called == through & ran, Counter(type(each).__name__ for each in called ^ (through & ran))
        else:
            assert not called
        for path, module in model.named_modules():
            if path in rows and not rows[path].changed and path:
                assert module not in called and not uses_interface(type(module)), path
    report.restore()
    assert model.config._attn_implementation == ("sdpa" if name in AS_SDPA else "eager")


def test_most_families_are_swept():
    listed = " ".join(NOT_BUILT.values()).split()
    assert len(NAMES) >= LEAST and len(listed) == len(set(listed))
