/*
 * Softmax of each row: y[r][c] = exp(x[r][c]) / sum over c of exp(x[r][c]), in float32.
 *
 * x and y hold rows * columns values and never overlap. Any x up to 80 in size must work.
 * The judge compiles this file with cc -O3 -march=native -shared -fPIC, and calls softmax from one thread.
 */
#include <math.h>

void softmax(const float *x, float *y, long rows, long columns)
{
    for (long r = 0; r < rows; r++) {
        double sum = 0;
        for (long c = 0; c < columns; c++)
            sum += exp(x[r * columns + c]);
        for (long c = 0; c < columns; c++)
            y[r * columns + c] = (float)(exp(x[r * columns + c]) / sum);
    }
}
