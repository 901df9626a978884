"""The ops under the names and signatures of other trainers, and context managers that put them in there.

    from zs_kernels.compat import trl                      # or verl, openrlhf
    with trl.patch() as patched:
        trainer.train()                                    # TRL's own trainer, on our ops
    print(patched.calls)

Each module's functions take and return what the framework's do: names, shapes, masks, constants, types. They differ in
three respects, all of them said here: statistics are summed in float32 or wider whatever the type of the input; a
masked slot may hold anything, NaN included, in the forward and the backward pass; and where the framework divides by
an empty mask and returns NaN, these return 0 (where it raises, so do these). What an op cannot express raises an error
that names the way out. Importing these modules imports nothing but torch; the framework itself is needed by `patch()`
alone, at the version that the module's VERSION says.
"""
