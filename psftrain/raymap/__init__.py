"""A PSF field as a ray map: where each point of the pupil lands on the sensor, smooth in pupil and field.

A kernel is what is left when rays that fill a pupil evenly land on a sensor. Kernels of neighbouring field points
differ by rays that move, not by samples that brighten and fade, so interpolating rays errs tens of times less than
interpolating kernels. The rays are found from the kernels alone (no prescription): `search` fits the coefficients of
a smooth map by nonlinear least squares from many starts, coarse to fine.

The map is that of wave aberration theory (Hopkins, "Wave Theory of Aberrations", 1950): transverse aberrations are
the gradient of a function of field and pupil whose terms a rotation of both leaves as they are; a misaligned lens
adds terms that turn once with the field (Thompson, JOSA A 22, 1389, 2005).
"""
