"""Compiles kernels for NVIDIA GPUs on a machine that has none: Triton includes ptxas. For run_apart only: it changes torch.cuda.

`built` compiles one kernel of Triton. `make_card_known` lets torch's inductor write its Triton code as for a card, whose numbers
are in CARDS; the code is then compiled by `built`, but cannot run.
"""

import importlib.util
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KB = 1024
CARDS = {  # capability: name, multiprocessors, threads and bytes of shared memory of one, bytes that one block may have
    75: ("Tesla T4", 40, 1024, 64 * KB, 64 * KB),
    80: ("A100", 108, 2048, 164 * KB, 163 * KB),
    89: ("RTX 4090", 128, 1536, 100 * KB, 99 * KB),
    90: ("H100", 132, 2048, 228 * KB, 227 * KB),
}
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def built(source: ASTSource, capability: int, **options: int):
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


# Our kernels


def product_kernel(kernel: str, rows: int, dtype: str, capability: int) -> dict:
    """What Triton makes of a kernel of triton_products.py for sizes that are multiples of 16, as those of all models are."""
    from paligemma.gpu import triton_products

    function = getattr(triton_products, kernel)
    if kernel == "int8_dot_kernel":
        block_o, block_x, warps = triton_products.DOT_BLOCK_O, triton_products.DOT_BLOCK_X, 1
        sizes = {"ROWS": triton_products.MAX_ROWS, "BLOCK_O": block_o, "BLOCK_X": block_x}
    else:
        sizes = triton_products.constants(torch.empty(rows, 16, dtype=getattr(torch, dtype)))
        warps, block_o = sizes.pop("num_warps"), sizes["BLOCK_O"]
        block_x = sizes["THREADS"] * sizes["VECTOR"]
    pointers = {"x": TYPES[dtype], "packed": "i8" if kernel.startswith("int8") else "u8", "scales": "fp32", "y": TYPES[dtype]}
    signature = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(("rows", "outputs", "inputs"), "i32")
    signature |= dict.fromkeys(sizes, "constexpr")
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "outputs", "inputs")}
    made = built(ASTSource(function, signature, constexprs=sizes, attrs=aligned), capability, num_warps=warps)
    before_loop, *loops = made.asm["ttir"].split("scf.for")
    loads = [re.findall(r"tt\.load .*tensor<([\dx]+)x!tt\.ptr<(\w+)>>", part) for part in (before_loop, *loops)]
    weights = [[shape for shape, kind in part if kind == "i8"] for part in loads]
    return {
        "loads of weights outside": len(weights[0]),
        "loads of weights in the loops": [[int(size) for size in shape.split("x")] for shape in sum(weights[1:], [])],
        "loops": len(loops),
        "block": [block_o, block_x],
        "shared": made.metadata.shared,
        "cubin": len(made.asm["cubin"]),
    }


def product_kernels(arguments: list) -> list[dict]:
    return [product_kernel(*each) for each in arguments]


# Kernels that inductor writes


def make_card_known(capability: int) -> SimpleNamespace:
    """Replaces the functions by which inductor asks torch for the card."""
    import torch._inductor.config as config
    from torch._dynamo.device_interface import CudaInterface
    from triton.runtime import driver

    from tests.gpu.pretend import load_guard

    load_guard()
    name, multiprocessors, threads, shared, shared_per_block = CARDS[capability]
    pair, target = divmod(capability, 10), GPUTarget("cuda", capability, 32)
    properties = SimpleNamespace(
        name=name, major=pair[0], minor=pair[1], multi_processor_count=multiprocessors, warp_size=32, gcnArchName="",
        max_threads_per_multi_processor=threads, max_threads_per_block=1024, regs_per_multiprocessor=65536, total_memory=2**34,
        shared_memory_per_block=48 * KB, shared_memory_per_block_optin=shared_per_block, L2_cache_size=2**22,
        shared_memory_per_multiprocessor=shared,
    )  # fmt: skip
    answers = {
        "_lazy_init": None, "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_properties": properties, "get_device_capability": pair, "get_device_name": name, "synchronize": None,
        "set_device": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "is_bf16_supported": capability >= 80,
        "get_rng_state": torch.zeros(1), "set_rng_state": None,
    }  # fmt: skip
    for key, answer in answers.items():
        setattr(torch.cuda, key, lambda *_arguments, answer=answer, **_options: answer)
    torch.version.cuda = "13.0"
    for key, answer in {
        "get_device_properties": properties, "is_available": True, "device_count": 1, "current_device": 0,
        "get_compute_capability": capability, "is_bf16_supported": capability >= 80, "raise_if_triton_unavailable": None,
        "is_triton_capable": True,
    }.items():  # fmt: skip
        setattr(CudaInterface, key, staticmethod(lambda *_arguments, answer=answer, **_options: answer))
    for key, answer in {"get_device_properties": properties, "current_device": 0}.items():
        setattr(CudaInterface.Worker, key, staticmethod(lambda *_arguments, answer=answer, **_options: answer))
    config.compile_threads, config.force_disable_caches = 1, True
    sizes = {"max_shared_mem": shared_per_block, "multiprocessor_count": multiprocessors, "max_num_regs": 65536, "warpSize": 32}
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda *_device: 0,
            get_active_torch_device=lambda: torch.device("cuda", 0), get_device_capability=lambda *_device: pair,
            is_active=lambda: True, utils=SimpleNamespace(get_device_properties=lambda _device: sizes),
        )
    )  # fmt: skip
    return properties


def kernels_in(code: str, folder: Path) -> dict[str, object]:
    """The kernels in a module that inductor has written, by name."""
    found = {}
    for name, source in re.findall(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", code, re.DOTALL):
        file = folder / f"{name}.py"
        file.write_text(source.replace("triton_helpers.set_driver_to_gpu()", ""))
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[name] = getattr(module, name)
    return found


def build_all(code: str, capability: int) -> dict[str, int]:
    """The shared memory of each kernel in inductor's code, compiled with its first choice of block sizes."""
    shared = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kernel in kernels_in(code, Path(folder)).items():
            meta, choice = kernel.triton_meta, kernel.configs[0]
            names = kernel.fn.arg_names
            marks = {(names.index(names[place[0]]),): marks for each in meta["configs"] for place, marks in each.items()}
            constants = dict(meta.get("constants", {})) | choice.kwargs
            source = ASTSource(kernel.fn, dict(meta["signature"]), constexprs=constants, attrs=marks)
            made = built(source, capability, num_warps=choice.num_warps, num_stages=choice.num_stages)
            assert made.asm["cubin"]
            shared[name] = made.metadata.shared
    return shared


def lowered(function, arguments: list, mode) -> str:
    """The code that inductor writes for a function of fake tensors."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    with mode, torch.no_grad():
        functional = torch.func.functionalize(function)
        graph = make_fx(functional, decomposition_table=select_decomp_table(), tracing_mode="real")(*arguments)
        with V.set_fake_mode(mode):
            post_grad_passes(graph, True)
    lowering = GraphLowering(graph, example_inputs=arguments, shape_env=None, is_inference=True)
    with V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()), torch.no_grad():
        lowering.run(*arguments)
        code = lowering.codegen()[0]
    return getattr(code, "value", code)


WIDTHS = {  # of the models with 3 billion parameters
    "gemma": {"hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8, "num_key_value_heads": 1},
    "gemma2": {
        "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
    },
}  # fmt: skip


def step_kernels(family: str, num_layers: int, capabilities: list[int]) -> dict[str, object]:
    """The kernels of a compiled decoding step of full width, with the modules that are used on CUDA.

    Returns: the number of kernels by inductor and by libraries, and the shared memory of the former for each capability.
    """
    make_card_known(capabilities[-1])
    import torch._inductor.config as config
    from torch._subclasses.fake_tensor import FakeTensorMode

    from paligemma.gpu.cuda_decoding import CudaAttention, CudaModel
    from paligemma.layers.batch_cache import BatchCache
    from paligemma.layers.replacing import extended
    from paligemma.modeling_gemma import GemmaConfig, GemmaEmbedding, GemmaForCausalLM

    config.coordinate_descent_tuning = True
    # GemmaEmbedding reads its factor from a tensor on the CPU. This is no work of the device, so a number replaces it here.
    GemmaEmbedding.forward = lambda self, ids: torch.nn.Embedding.forward(self, ids) * self.embedding_dim**0.5
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shape = GemmaConfig(vocab_size=257216, num_hidden_layers=num_layers, model_type=family, **WIDTHS[family])
    with mode, torch.device("cuda:0"):
        torch.set_default_dtype(torch.bfloat16)
        decoder = GemmaForCausalLM(shape, 30.0 if family == "gemma2" else None).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        for layer in decoder.model.layers:
            layer.self_attn = extended(layer.self_attn, CudaAttention)
        decoder.model = extended(decoder.model, CudaModel)
        cache = BatchCache(shape, 1, 1024, device=torch.device("cuda:0"), dtype=torch.bfloat16).fixed(512)
        tensors = {"tokens": torch.zeros(1, dtype=torch.int64), "lengths": cache.lengths, "rows": cache.rows}
        tensors |= {"keys": cache.keys, "values": cache.values}
    weights = dict(decoder.state_dict())
    names = [*tensors, *weights]

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, tokens):  # PaliGemmaForConditionalGeneration.step
            cache.lengths.add_(1)
            x = decoder.model.embed_tokens(tokens[:, None])
            return decoder.logits(decoder.model(x, cache.lengths[:, None], cache.mask(), cache)[:, 0])

    def step(*arguments):
        from torch.utils._pytree import tree_unflatten

        given = dict(zip(names, tree_unflatten(list(arguments), spec), strict=True))
        tokens, cache.lengths, cache.rows, cache.keys, cache.values = (given.pop(name) for name in tensors)
        return torch.func.functional_call(Step(), {f"decoder.{name}": value for name, value in given.items()}, (tokens,))

    from torch.utils._pytree import tree_flatten

    leaves, spec = tree_flatten([*tensors.values(), *weights.values()])
    code = lowered(step, leaves, mode)
    body = code[code.index("def call") :]
    return {
        "by inductor": len(re.findall(r"triton_\w+\.run\(", body)),
        "by libraries": len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.aten\.\w+", body)),
        "shared": {capability: build_all(code, capability) for capability in capabilities},
    }


def capped_attention_kernel(capability: int, num_tokens: int = 1024, options: dict | None = None) -> dict:
    """Gemma 2's attention with a soft cap for a long prompt (head_dim 256), with the block sizes that this card gets.

    Args:
        options: other block sizes than those of the profile.
    """
    make_card_known(capability)
    import torch._inductor.config as config
    import torch._inductor.fx_passes.joint_graph as joint_graph
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    from paligemma import devices
    from paligemma.gpu import capped_attention

    class Written(Exception):
        """Ends the compilation after inductor has written its code; the next step would need a card."""

    def stop(lowering):
        code = plain_codegen(lowering)[0]
        raise Written(getattr(code, "value", code))

    plain_codegen, GraphLowering.codegen = GraphLowering.codegen, stop
    # Two passes are switched off, because they would make tensors on the card: examples of patterns, and constants.
    joint_graph.lazy_init, config.joint_graph_constant_folding = lambda *_arguments, **_options: None, False
    devices.has_triton = lambda: True
    if options is None:
        options = capped_attention.kernel_options(torch.device("cuda:0"), torch.bfloat16, 256)
    with FakeTensorMode(), torch.device("cuda:0"), torch.no_grad():
        q, k, v = (torch.empty(1, heads, num_tokens, 256, dtype=torch.bfloat16) for heads in (8, 4, 4))
        try:
            torch.compile(capped_attention.capped_attention, fullgraph=True, dynamic=False)(q, k, v, None, 0.0625, 50.0, options)
        except Exception as error:
            while error is not None and not isinstance(error, Written):
                error = error.__cause__ or error.__context__
            if error is None:
                raise
            code = str(error)
    shared = build_all(code, capability)
    return {"shared": max(shared.values()), "kernels": len(shared), "options": options}
