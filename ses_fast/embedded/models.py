"""The parts of the embedded pipeline: autoencoder, tokenizer, text encoder, and DiffSynth's real `ZImageDiT`, small."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torchvision import declare_torchvision_ops
from ..errors import missing_extra
from . import world

CAPTION_WIDTH = 128  # the text encoder's features
CAPTION_LENGTH = 32  # ZImageDiT pads captions to a multiple of 32 anyway
LATENT_CHANNELS = 16
DOWNSCALE = 8
REWARD_PIXELS = 96
SPECIAL_TOKENS = (
    "<pad>",
    "<unk>",
    "<bos>",
    "<eos>",
)  # <eos> is not 2: transformers' CLIP gives 2 an old meaning


def sigma_shift(height: int, width: int) -> float:
    """The schedule's shift for a size in pixels: twice the shift for twice the size, so 5 at 256x256, 2.5 at 128x128.

    A low band of Haar's wavelet (half the sum of four) makes white noise white noise again, and smooth latents twice
    those of the image at half the size: what is lost in noise at one size is then lost in noise at the other too.
    """
    return 5 * (height * width) ** 0.5 / 256


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class _Normalised(nn.Module):
    """Holds the latents' per-channel mean and deviation, measured after training."""

    mean: Tensor  # [1, 16, 1, 1]
    std: Tensor  # [1, 16, 1, 1]

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, LATENT_CHANNELS, 1, 1))
        self.register_buffer("std", torch.ones(1, LATENT_CHANNELS, 1, 1))


class Encoder(_Normalised):
    """Image (n, 3, H, W) in [-1, 1] to latents (n, 16, H/8, W/8) of zero mean and unit variance."""

    def __init__(self, coarse: int = 96, fine: int = 48):
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, fine, 3, padding=1),
            _Residual(fine),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * fine, coarse, 1),
            _Residual(coarse),
            _Residual(coarse),
            nn.Conv2d(coarse, LATENT_CHANNELS, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        bounded = 4 * torch.tanh(self.body(image) / 4)  # no outliers for the denoiser to learn
        return (bounded - self.mean) / self.std


class Decoder(_Normalised):
    """Latents (n, 16, h, w) to image (n, 3, 8h, 8w), about [-1, 1]."""

    def __init__(self, coarse: int = 96, fine: int = 48):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, coarse, 3, padding=1),
            _Residual(coarse),
            _Residual(coarse),
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            _Residual(fine),
            _Residual(fine),
            nn.Conv2d(fine, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.body(latents * self.std + self.mean)


class TextEncoder(nn.Module):
    """Two bidirectional layers, with the face of a transformers model that Z-Image's prompt unit expects."""

    def __init__(self, layers: int = 2):
        super().__init__()
        self.words = nn.Embedding(len(SPECIAL_TOKENS) + len(world.vocabulary()), CAPTION_WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CAPTION_LENGTH, CAPTION_WIDTH))
        layer = nn.TransformerEncoderLayer(
            CAPTION_WIDTH, 4, 2 * CAPTION_WIDTH, 0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(
        self,
        input_ids: Tensor,  # [B, L]
        attention_mask: Tensor,  # [B, L], 1 where a token is
        output_hidden_states: bool = True,
    ) -> SimpleNamespace:
        # The pipeline pads prompts to 512 tokens; the model was trained on 32.
        ids, mask = input_ids[:, :CAPTION_LENGTH], attention_mask[:, :CAPTION_LENGTH].bool()
        features = self.words(ids) + self.positions[: ids.shape[1]]
        features = self.layers(features, src_key_padding_mask=~mask)
        features = F.pad(features, (0, 0, 0, input_ids.shape[1] - ids.shape[1]))
        return SimpleNamespace(hidden_states=(features, features))  # the prompt unit reads the last but one


def build_tokenizer():
    """A word-level transformers tokenizer over the world's vocabulary; a chat template that adds nothing."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast
    except ModuleNotFoundError as error:
        raise missing_extra("transformers", "embedded") from error
    ids = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *world.vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template="{{ messages[0]['content'] }}",
        model_max_length=CAPTION_LENGTH,
    )


def build_dit() -> nn.Module:
    """DiffSynth's `ZImageDiT` with 4.5 M parameters, every one of them initialised."""
    declare_torchvision_ops()
    try:
        from diffsynth.models.z_image_dit import ZImageDiT
    except ModuleNotFoundError as error:
        raise missing_extra("diffsynth", "embedded") from error
    dit = ZImageDiT(
        dim=192,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=CAPTION_WIDTH,
        axes_dims=[16, 24, 24],
        axes_lens=[256, 64, 64],
    )
    for name, parameter in dit.named_parameters():
        if parameter.ndim >= 2:
            width = parameter.shape[1]
            nn.init.trunc_normal_(parameter, std=0.02 if "adaLN" in name else 0.8 * width**-0.5)
        elif "norm" in name:
            nn.init.ones_(parameter)
        else:
            nn.init.zeros_(parameter)
    nn.init.zeros_(dit.all_final_layer["2-1"].linear.weight)
    # The real timestep embedder casts its input to bf16 whatever its weights are; here they may be fp32.
    dit.t_embedder.mlp.register_forward_pre_hook(lambda mlp, inputs: (inputs[0].to(mlp[0].weight.dtype),))
    return dit


def build_clip() -> nn.Module:
    """A transformers `CLIPModel` with 1.2 M parameters for REWARD_PIXELS x REWARD_PIXELS images."""
    declare_torchvision_ops()
    try:
        from transformers import CLIPConfig, CLIPModel
    except ModuleNotFoundError as error:
        raise missing_extra("transformers", "embedded") from error
    shared = {"hidden_size": 128, "num_attention_heads": 4}
    text = {
        "vocab_size": len(SPECIAL_TOKENS) + len(world.vocabulary()),
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "max_position_embeddings": CAPTION_LENGTH,
        "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
        "bos_token_id": SPECIAL_TOKENS.index("<bos>"),
        "eos_token_id": SPECIAL_TOKENS.index("<eos>"),
    }
    vision = {"intermediate_size": 384, "num_hidden_layers": 5, "image_size": REWARD_PIXELS, "patch_size": 12}
    return CLIPModel(CLIPConfig(text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=96))
