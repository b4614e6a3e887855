"""Tiny pipelines with random weights, built from DiffSynth's own classes with their own forwards."""

import torch
from torch import Tensor, nn

from ses_fast._torchvision import mend_torchvision

mend_torchvision()

from diffsynth.models.flux_vae import (  # noqa: E402
    DownSampler,
    FluxVAEDecoder,
    FluxVAEEncoder,
    ResnetBlock,
    UpSampler,
    VAEAttentionBlock,
)
from diffsynth.models.z_image_dit import ZImageDiT  # noqa: E402
from diffsynth.models.z_image_text_encoder import ZImageTextEncoder  # noqa: E402
from diffsynth.pipelines.z_image import ZImagePipeline  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model  # noqa: E402

TEXT_WIDTH = 32


def tiny_z_image(dtype: torch.dtype = torch.float32, seed: int = 0) -> ZImagePipeline:
    pipe = ZImagePipeline(device="cpu", torch_dtype=dtype)
    pipe.tokenizer = byte_tokenizer("<{{ messages[0]['content'] }}>")
    pipe.text_encoder = TinyTextEncoder()
    pipe.dit = ZImageDiT(
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 8, 8],
        axes_lens=[640, 32, 32],
    )
    # The real timestep embedder casts its input to bf16, whatever its weights are.
    pipe.dit.t_embedder.mlp.register_forward_pre_hook(lambda mlp, inputs: (inputs[0].to(mlp[0].weight),))
    pipe.vae_decoder, pipe.vae_encoder = TinyVAEDecoder(), TinyVAEEncoder()
    initialise(pipe, seed)
    pipe.vae_decoder.conv_out.weight.data *= 0.5  # most pixels within [-1, 1], some beyond
    return pipe.to(dtype).eval().requires_grad_(False)


def initialise(module: nn.Module, seed: int) -> None:
    """Every parameter (some of DiffSynth's are torch.empty), so that each has a part in the image."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5  # keeps the size of what goes through
        else:
            parameter.data = (1.0 if name.endswith("weight") else 0.0) + 0.1 * noise  # norms and biases


def byte_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: any text, no download."""
    vocabulary = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", chat_template=chat_template)


class TinyTextEncoder(ZImageTextEncoder):
    """The real forward; the real sizes are written into the real __init__."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.model = Qwen3Model(
            Qwen3Config(
                vocab_size=257,
                hidden_size=TEXT_WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=512,
            )
        )


def _ends(module: nn.Module, channels: tuple[int, int], width: int) -> None:
    """What stands before and after the blocks of a FLUX autoencoder half."""
    module.scaling_factor, module.shift_factor = 0.3611, 0.1159
    module.conv_in = nn.Conv2d(channels[0], width, 3, padding=1)
    module.conv_norm_out = nn.GroupNorm(32, width, eps=1e-6)
    module.conv_act = nn.SiLU()
    module.conv_out = nn.Conv2d(width, channels[1], 3, padding=1)


class TinyVAEDecoder(FluxVAEDecoder):
    def __init__(self, width: int = 32) -> None:  # a multiple of GroupNorm's 32 groups
        nn.Module.__init__(self)
        _ends(self, (16, 3), width)
        blocks: list[nn.Module] = [VAEAttentionBlock(1, width, width)]
        for _ in range(3):
            blocks += [ResnetBlock(width, width), UpSampler(width)]
        self.blocks = nn.ModuleList(blocks)


class TinyVAEEncoder(FluxVAEEncoder):
    def __init__(self, width: int = 32) -> None:
        nn.Module.__init__(self)
        _ends(self, (3, 32), width)
        blocks: list[nn.Module] = []
        for _ in range(3):
            blocks += [ResnetBlock(width, width), DownSampler(width, padding=0, extra_padding=True)]
        self.blocks = nn.ModuleList([*blocks, VAEAttentionBlock(1, width, width)])


def brightness(images: Tensor, prompt: str) -> Tensor:
    """A reward that needs no weights: [n]."""
    return images.float().mean(dim=(1, 2, 3))
