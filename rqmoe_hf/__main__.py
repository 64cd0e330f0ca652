"""`python -m rqmoe_hf`, and so `torchrun -m rqmoe_hf train ...` and `accelerate launch -m rqmoe_hf train ...`."""

from .cli import main

if __name__ == "__main__":
    main()
