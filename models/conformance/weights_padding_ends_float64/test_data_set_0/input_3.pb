	Bper_sample_weightsJHm£рYtЄжњ—'C^ъu’њmJA
v“?Ќяв†й?Ќ÷—«@ЌњІГ•vа[д? \aѓд≤?мЏ%Гwћ?s≥∆pйњ