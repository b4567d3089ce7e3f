# 64 KiB ROM at 0xF0000 (and 0xFFFF0000). Reset vector at offset 0xfff0.
.code16
.org 0
start:
    cli
    movw $0xf000, %ax
    movw %ax, %ds
    lgdtl %cs:gdtr
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $0x08, $(0xf0000 + prot)
.code32
prot:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x80000, %esp
    # page tables at 0x10000: PML4, PDPT, PD (2 MiB pages over 1 GiB)
    movl $0x10000, %edi
    xorl %eax, %eax
    movl $0xc00, %ecx
    rep stosl
    movl $0x11003, 0x10000
    movl $0x12003, 0x11000
    movl $0x12000, %edi
    movl $0x83, %eax
    movl $512, %ecx
1:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    loop 1b
    movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl $0x10000, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    ljmpl $0x18, $(0xf0000 + long)
.code64
long:
    # touch 8 MiB from 4 MiB on, then copy it
    movl $0x400000, %edi
    movl $0x100000, %ecx
    movq $0x5a5a5a5a5a5a5a5a, %rax
    rep stosq
    cpuid
    rdtsc
    movb $0x2a, %al
    outb %al, $0xf4
2:  hlt
    jmp 2b
.balign 8
gdt: .quad 0
     .quad 0x00cf9a000000ffff
     .quad 0x00cf92000000ffff
     .quad 0x00af9a000000ffff
gdtr: .word 31
      .long 0xf0000 + gdt
.org 0xfff0
.code16
    ljmpw $0xf000, $start
.org 0x10000
