//! How a hypervisor enters: by the PVH note in 32-bit mode, or as it enters Linux in 64-bit mode.
//! Both ways come out in long mode with the first 4 GiB where they are, and call `probe`.

use core::arch::global_asm;

global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18              # the name's and the entry's sizes; XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

    .section .boot, "ax"
    .code32
    .globl pvh_entry
pvh_entry:                      # ebx: hvm_start_info
    cld
    movl $pml4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x20, %eax             # PAE
    movl %eax, %cr4
    movl $0xc0000080, %ecx      # EFER
    rdmsr
    orl $0x100, %eax            # LME
    wrmsr
    movl %ebx, %esi
    movl %cr0, %eax
    orl $0x80000001, %eax       # PG, PE
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $1f

    .code64
1:  movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %ebp, %ebp
    jmp 2f

    .globl linux_entry
linux_entry:                    # rsi: boot_params
    cld
    movq $pml4, %rax
    movq %rax, %cr3
    movl $1, %ebp

2:  movq $stack_end, %rsp
    movq $bss_begin, %rdi
    movq $bss_end, %rcx
    subq %rdi, %rcx
    xorl %eax, %eax
    rep stosb
    movq %rsi, %rdi
    movl %ebp, %esi
    call probe

    .section .data
    .balign 4096
pml4:
    .quad pdpt + 3
    .fill 511, 8, 0
pdpt:
    .quad low + 3, low + 0x1003, low + 0x2003, low + 0x3003, window + 3
    .fill 507, 8, 0
low:
    .set at, 0
    .rept 2048
    .quad at + 0x83             # 2 MiB, writable
    .set at, at + 0x200000
    .endr
    .globl window
window:                         # what lies higher is shown from 4 GiB on
    .fill 512, 8, 0
    .balign 8
gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word 23
    .long gdt

    # Not cleared with the rest: it is in use by then.
    .balign 16
    .fill 16384
stack_end:
    "#,
    options(att_syntax)
);

// What the compiler takes for granted.
global_asm!(
    r#"
    .text
    .globl memcpy, memmove, memset, memcmp, bcmp
memmove:
    cmpq %rsi, %rdi
    jbe memcpy
    movq %rdi, %rax
    movq %rdx, %rcx
    leaq -1(%rdi, %rdx), %rdi
    leaq -1(%rsi, %rdx), %rsi
    std
    rep movsb
    cld
    ret
memcpy:
    movq %rdi, %rax
    movq %rdx, %rcx
    rep movsb
    ret
memset:
    movq %rdi, %r8
    movl %esi, %eax
    movq %rdx, %rcx
    rep stosb
    movq %r8, %rax
    ret
bcmp:
memcmp:
    xorl %eax, %eax
1:  testq %rdx, %rdx
    jz 2f
    movzbl (%rdi), %eax
    movzbl (%rsi), %ecx
    incq %rdi
    incq %rsi
    decq %rdx
    subl %ecx, %eax
    jz 1b
2:  ret
    "#,
    options(att_syntax)
);
