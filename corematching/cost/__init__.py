"""What costs are computed from: FLOPs, roofline, hardware profiles, memory."""
