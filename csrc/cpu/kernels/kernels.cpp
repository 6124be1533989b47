// Compiled once for each instruction set, with -DGPTOSS_ISA=<name> and that set's flags. Everything included here has internal
// linkage; the table is the one symbol an object exports.
#include "cpu/kernel_table.h"
#include "pack.h"
#include "matmul.h"
#include "pack_int8.h"
#include "matmul_int8.h"
#include "attention.h"
#include "pointwise.h"

#define NAME_OF_(isa) gptoss_kernels_##isa
#define NAME_OF(isa) NAME_OF_(isa)
#define TEXT_OF_(isa) #isa
#define TEXT_OF(isa) TEXT_OF_(isa)

extern "C" const gptoss::cpu::KernelTable NAME_OF(GPTOSS_ISA) = {
    .name = TEXT_OF(GPTOSS_ISA),
    .tiles = {kTile, kTile},
    .packed_bytes = sizeof(Packed),
    .pack_bf16_panel = pack_bf16_panel,
    .pack_mxfp4_blocks = pack_mxfp4_blocks,
    .pack_mxfp4_scales = pack_mxfp4_scales,
    .pack_tokens = pack_tokens,
    .matmul = matmul,
    .int8_tiles = kInt8Tiles,
    .pack_int8_panel = pack_int8_panel,
    .pack_tokens_int8 = pack_tokens_int8,
    .matmul_int8 = matmul_int8,
    .embed = embed,
    .rmsnorm = rmsnorm,
    .router = router,
    .rope = rope,
    .append = append,
    .attention = attention,
    .attention_states = attention_states,
    .attention_join = attention_join,
};
