//! The vector registers, through which everything that is copied or encrypted passes. What was in
//! them last stays while a thread waits: in its context, which a core dump has in its notes.

#![expect(unsafe_code, reason = "no language names a register")]

#[cfg(target_arch = "x86_64")]
use std::arch::asm;

/// Wipes what the calling thread has in its vector registers. Takes some ten nanoseconds; to be
/// called before a thread that has had plaintext or keys in hand waits. On processors other than
/// x86-64 it does nothing.
#[inline]
pub fn wipe() {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has what it is compiled for.
            unsafe { wipe_avx512() };
        } else if is_x86_feature_detected!("avx") {
            // SAFETY: the same.
            unsafe { wipe_avx() };
        } else {
            wipe_sse();
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn wipe_avx512() {
    // SAFETY: it changes nothing but registers that a call may change.
    unsafe {
        asm!(
            "vzeroall",
            "vpxorq zmm16, zmm16, zmm16",
            "vpxorq zmm17, zmm17, zmm17",
            "vpxorq zmm18, zmm18, zmm18",
            "vpxorq zmm19, zmm19, zmm19",
            "vpxorq zmm20, zmm20, zmm20",
            "vpxorq zmm21, zmm21, zmm21",
            "vpxorq zmm22, zmm22, zmm22",
            "vpxorq zmm23, zmm23, zmm23",
            "vpxorq zmm24, zmm24, zmm24",
            "vpxorq zmm25, zmm25, zmm25",
            "vpxorq zmm26, zmm26, zmm26",
            "vpxorq zmm27, zmm27, zmm27",
            "vpxorq zmm28, zmm28, zmm28",
            "vpxorq zmm29, zmm29, zmm29",
            "vpxorq zmm30, zmm30, zmm30",
            "vpxorq zmm31, zmm31, zmm31",
            clobber_abi("C"),
            options(nomem, nostack, preserves_flags),
        );
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
fn wipe_avx() {
    // SAFETY: it changes nothing but registers that a call may change.
    unsafe { asm!("vzeroall", clobber_abi("C"), options(nomem, nostack, preserves_flags)) };
}

#[cfg(target_arch = "x86_64")]
fn wipe_sse() {
    // SAFETY: it changes nothing but registers that a call may change.
    unsafe {
        asm!(
            "xorps xmm0, xmm0",
            "xorps xmm1, xmm1",
            "xorps xmm2, xmm2",
            "xorps xmm3, xmm3",
            "xorps xmm4, xmm4",
            "xorps xmm5, xmm5",
            "xorps xmm6, xmm6",
            "xorps xmm7, xmm7",
            "xorps xmm8, xmm8",
            "xorps xmm9, xmm9",
            "xorps xmm10, xmm10",
            "xorps xmm11, xmm11",
            "xorps xmm12, xmm12",
            "xorps xmm13, xmm13",
            "xorps xmm14, xmm14",
            "xorps xmm15, xmm15",
            clobber_abi("C"),
            options(nomem, nostack, preserves_flags),
        );
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_in_a_register() {
        for wipes in [wipe, wipe_sse] {
            let secret = [0x5a5a_5a5a_5a5a_5a5au64; 2];
            // SAFETY: it loads one register from an array that is as large.
            unsafe { asm!("movups xmm7, [{}]", in(reg) &raw const secret, out("xmm7") _) };
            wipes();
            let mut found = [1u64; 2];
            // SAFETY: it stores one register to an array that is as large.
            unsafe { asm!("movups [{}], xmm7", in(reg) &raw mut found, options(nostack)) };
            assert_eq!(found, [0; 2]);
        }
    }

    /// Fills the registers of 512 bits at both ends of both halves, wipes, and shows them.
    #[target_feature(enable = "avx512f")]
    fn wide() -> [[u64; 8]; 4] {
        let (secret, mut found) = ([0x5a5a_5a5a_5a5a_5a5au64; 8], [[1; 8]; 4]);
        // SAFETY: it loads registers from an array that is as large as one.
        unsafe {
            asm!(
                "vmovdqu64 zmm0, [{0}]",
                "vmovdqu64 zmm15, [{0}]",
                "vmovdqu64 zmm16, [{0}]",
                "vmovdqu64 zmm31, [{0}]",
                in(reg) &raw const secret,
                clobber_abi("C"),
            );
        }
        wipe();
        // SAFETY: it stores four registers to an array of as many.
        unsafe {
            asm!(
                "vmovdqu64 [{0}], zmm0",
                "vmovdqu64 [{0} + 64], zmm15",
                "vmovdqu64 [{0} + 128], zmm16",
                "vmovdqu64 [{0} + 192], zmm31",
                in(reg) &raw mut found,
                options(nostack),
            );
        }
        found
    }

    #[test]
    fn nothing_is_left_in_the_widest_registers_of_any_number() {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has what it is compiled for.
            assert_eq!(unsafe { wide() }, [[0; 8]; 4]);
        }
    }
}
