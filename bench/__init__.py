"""What is measured, and how.

baseline: what ses_fast is compared with: the documented flow, and HPSv2 as its authors score a picture.
clip: CLIP as its users have it, with random weights, and when two sides' scores are the same.
collect: the parts of a run in one JSON and one Markdown file of bench/results.
compare: what moved since the last committed run.
cpu: the ops on a CPU beside what they replace, in turns.
embedded: what a search gains on the embedded model.
end_to_end: whole searches, the documented flow against ses_fast.
environment: what a result was measured on; the clock.
families: the image families at their published sizes, as data.
floor: the least time a search can take on a device, counted on the real modules.
keep: what `ses-fast compare` and `calibrate` found, put into bench/results.
ops: runs test_bench_ops (every op) and test_bench_rewards (images a second), and keeps their figures.
readme_tables: the tables of README and site, made of bench/results; reference_tables: those made of the code.
sheet: what the embedded model draws, on one sheet.
table: Markdown tables, and those of ops and rewards.
gpu.sh: all that a GPU machine can measure, in ten minutes.
"""
