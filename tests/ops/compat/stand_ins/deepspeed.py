"""openrlhf.models.utils imports deepspeed at its top and reads nothing of it in the functions compared here."""
