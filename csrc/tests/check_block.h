// The checks of a decode step: of what it is made of, of its operations, and of reads that it waits for.
#pragma once

void check_parts(bool thoroughly);
void check_block(bool thoroughly);
void check_reader(bool thoroughly);
void check_block_callers(int rounds);  // several at once, while the number of threads changes
